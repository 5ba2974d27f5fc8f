"""Which calls can become part of a fused kernel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_aten = torch.ops.aten


class Kind(IntEnum):
    """What a call does with elements."""

    POINTWISE = 0
    REDUCTION = 1


_MOVING = {
    _aten._to_copy.default, _aten.clone.default, _aten.slice_backward.default,
    _aten.select_backward.default, _aten.constant_pad_nd.default, _aten.full.default,
    _aten.zeros.default, _aten.ones.default, _aten.full_like.default, _aten.zeros_like.default,
    _aten.ones_like.default, _aten.scalar_tensor.default, _aten.new_zeros.default,
}
_REDUCING = {
    _aten.native_layer_norm.default, _aten.native_layer_norm_backward.default,
    _aten.native_group_norm.default, _aten.native_group_norm_backward.default,
    _aten._native_batch_norm_legit_functional.default, _aten.native_batch_norm.default,
    _aten.native_batch_norm_backward.default, _aten._softmax.default,
    _aten._softmax_backward_data.default, _aten._log_softmax.default,
    _aten._log_softmax_backward_data.default, _aten.nll_loss_forward.default,
    _aten.nll_loss_backward.default, _aten.nll_loss2d_forward.default,
    _aten.nll_loss2d_backward.default, _aten.sum.dim_IntList, _aten.sum.default,
    _aten.mean.dim, _aten.mean.default, _aten.var_mean.correction, _aten.amax.default,
    _aten.mse_loss.default, _aten.mse_loss_backward.default,
}


def kind_of(node: fx.Node) -> Kind | None:
    """Return what a call does if it can be part of a kernel, None if it cannot."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _has_plain_tensors(node):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if target in _REDUCING:
        return Kind.REDUCTION
    if target in _MOVING:
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


def literals(node: fx.Node) -> tuple[Any, ...]:
    """Return what tells calls apart whose results round alike: operator, dtypes, numbers."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    dtypes = [str(i.meta["val"].dtype) for i in node.all_input_nodes]
    return str(node.target), *dtypes, *(repr(x) for x in leaves if not isinstance(x, fx.Node))
