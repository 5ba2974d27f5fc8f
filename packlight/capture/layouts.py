"""Fake results made like the real ones: dtypes and strides that were observed.

PyTorch's fake kernels may be wrong: about the dtype of batch norm's statistics in mixed precision,
about gradients that its backward leaves out, about the strides of its result where its input is a
transposed sequence. A graph that was traced with such strides may ask for a view that the real
tensor does not have, where eager PyTorch, which asks the tensor, copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.costs.measure import CallFacts


def as_observed(value: Any, facts: CallFacts) -> Any:
    """Return a call's fake results with the dtypes and strides seen, without what was not there.

    Those who read them are else observed on tensors that they would refuse, or copy.
    """
    seen = iter(facts.outputs)
    if isinstance(value, torch.Tensor):
        leaves, structure = [value], None
    else:
        leaves, structure = pytree.tree_flatten(value)

    def corrected(place: int, fake: Any) -> Any:
        if place in facts.missing:
            return None
        output = next(seen, None) if isinstance(fake, torch.Tensor) else None
        if output is None or not output.dtype:
            return fake
        dtype = getattr(torch, output.dtype)
        shape, stride = tuple(map(int, fake.shape)), tuple(map(int, fake.stride()))
        if output.alias_of is None and output.stride is not None:
            stride = stride if _is_same(shape, stride, output.stride) else output.stride
        if fake.dtype == dtype and stride == tuple(map(int, fake.stride())):
            return fake
        with fake.fake_mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=fake.device)

    made = [corrected(place, leaf) for place, leaf in enumerate(leaves)]
    return made[0] if structure is None else pytree.tree_unflatten(made, structure)


def same_strides(mine: Any, traced: Any) -> bool:
    """Whether fake results lie in memory alike; strides of sizes 0 and 1 say nothing."""
    if mine is traced:
        return True
    pairs = zip(pytree.tree_leaves(mine), pytree.tree_leaves(traced), strict=False)
    return all(
        _is_same(tuple(a.shape), tuple(a.stride()), tuple(b.stride()))
        for a, b in pairs
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )


def _is_same(shape: tuple[int, ...], mine: tuple[int, ...], other: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    return all(
        size == 1 or a == b for size, a, b in zip(shape, mine, other, strict=True)
    )


def retraced(node: fx.Node) -> Any:
    """Return a call's fake results for what its arguments are now."""
    args, kwargs = fake_arguments(node)
    target: Any = node.target
    with torch.no_grad():
        return target(*args, **kwargs)


def copies_before_view(node: fx.Node) -> list[fx.Node]:
    """Put a contiguous copy before a view that its argument does not have.

    Returns:
        The new node, if there has to be one; `node` then reads it.
    """
    source = node.args[0] if node.args else None
    if node.target is not torch.ops.aten.view.default or not isinstance(source, fx.Node):
        return []
    try:
        retraced(node)
    except (RuntimeError, ValueError):
        graph = node.graph
        with graph.inserting_before(node), torch.no_grad():
            copy = graph.call_function(
                torch.ops.aten.clone.default,
                (source,),
                {"memory_format": torch.contiguous_format},
            )
            copy.meta = {**node.meta, "val": retraced(copy)}
        node.args = (copy, *node.args[1:])
        return [copy]
    return []


def fake_arguments(node: fx.Node) -> tuple[Any, Any]:
    """Return a call's arguments as they are in the trace: args with fake tensors, kwargs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake_value)
    return args, kwargs


def fake_value(node: fx.Node) -> Any:
    """Return what a node is in the trace, sizes as numbers."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return value
