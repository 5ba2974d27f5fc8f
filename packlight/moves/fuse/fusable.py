"""Which calls can become part of a fused kernel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class Kind(IntEnum):
    """What a call does with elements."""

    POINTWISE = 0
    REDUCTION = 1


# Names of operators, as `str` has them.
_MOVING = {
    "aten._to_copy.default", "aten.clone.default", "aten.slice_backward.default",
    "aten.select_backward.default", "aten.constant_pad_nd.default", "aten.full.default",
    "aten.zeros.default", "aten.ones.default", "aten.full_like.default", "aten.zeros_like.default",
    "aten.ones_like.default", "aten.scalar_tensor.default", "aten.new_zeros.default",
}
_REDUCING = {
    "aten.native_layer_norm.default", "aten.native_layer_norm_backward.default",
    "aten.native_group_norm.default", "aten.native_group_norm_backward.default",
    "aten._native_batch_norm_legit_functional.default", "aten.native_batch_norm.default",
    "aten.native_batch_norm_backward.default", "aten._softmax.default",
    "aten._safe_softmax.default", "aten._softmax_backward_data.default",
    "aten._log_softmax.default", "aten._log_softmax_backward_data.default",
    "aten.nll_loss_forward.default", "aten.nll_loss_backward.default",
    "aten.nll_loss2d_forward.default", "aten.nll_loss2d_backward.default", "aten.sum.dim_IntList",
    "aten.sum.default", "aten.mean.dim", "aten.mean.default", "aten.var_mean.correction",
    "aten.amax.default", "aten.mse_loss.default", "aten.mse_loss_backward.default",
}


def kind_of(node: fx.Node) -> Kind | None:
    """Return what a call does if it can be part of a kernel, None if it cannot."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _has_plain_tensors(node):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if str(target) in _REDUCING:
        return Kind.REDUCTION
    if str(target) in _MOVING:
        return Kind.POINTWISE
    if torch.Tag.pointwise in target.tags and isinstance(node.meta["val"], torch.Tensor):
        is_known = target.namespace in ("aten", "prims") or target is dropout_backward()
        return Kind.POINTWISE if is_known else None
    return None


def dropout_backward() -> torch._ops.OpOverload:
    """Return the operator of Packlight's own that a kernel can contain (capture/dropout.py)."""
    overload: torch._ops.OpOverload = torch.ops.packlight.dropout_backward.default
    return overload


def _has_plain_tensors(node: fx.Node) -> bool:
    values = list(_tensors(node))
    is_tuple = isinstance(node.meta.get("val"), (tuple, list))
    if is_tuple and not all(user.target is operator.getitem for user in node.users):
        return False
    if any(not isinstance(i.meta.get("val"), torch.Tensor) for i in node.all_input_nodes):
        return False
    return bool(values) and all(
        value.device == values[0].device and value.layout is torch.strided
        and not (value.is_complex() or value.is_conj() or value.is_neg())
        for value in values
    )


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    results = pytree.tree_leaves(node.meta.get("val"))
    for value in (*results, *(i.meta.get("val") for i in node.all_input_nodes)):
        if isinstance(value, torch.Tensor):
            yield value


def domain(node: fx.Node) -> int:
    """Return how many elements a call goes through: those of its largest tensor."""
    return max(value.numel() for value in _tensors(node))


def sums_over_rows(node: fx.Node) -> bool:
    """Whether a result is known when all rows of a tensor were read, and not after each."""
    if node.target is not torch.ops.aten.var_mean.correction:
        return False
    source, dims = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(dims, (list, tuple))
    return 0 in dims or -source.meta["val"].dim() in dims


def literals(node: fx.Node) -> tuple[Any, ...]:
    """Return what tells calls apart whose results round alike: operator, dtypes, numbers."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    dtypes = [str(i.meta["val"].dtype) for i in node.all_input_nodes]
    return str(node.target), *dtypes, *(repr(x) for x in leaves if not isinstance(x, fx.Node))
