"""Dropout on a CPU with the bits of eager PyTorch, in less time and memory than traced PyTorch.

Eager PyTorch multiplies by noise, which it keeps in the dtype of the values. Traced, it keeps a
mask of bools, a fourth or half as large, but multiplies by it and then by a scale. That differs in

- bits: the noise is one over 1 - p, divided in the dtype of the values, and the scale the same
  divided in double precision. For 15 of p = 0.01 to 0.99 they differ in float32, among them 0.15;
  in bfloat16 the backward's scale is not rounded at all;
- random numbers: where p is 1, eager PyTorch draws none;
- time and memory: the product of values and bools makes a copy of the mask in the values' dtype,
  without vector instructions. It takes ten times as long as the product, and is workspace.

The operators here keep the mask, copy a byte's view of it into the result and multiply there by
the values and by what eager PyTorch's noise is.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.writer import GraphWriter
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten


@torch.library.custom_op(
    "packlight::dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def dropout(values: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `torch.dropout(values, p, True)` does, from the same random numbers, and a mask.

    Args:
        values: floating point, of any shape.
        p: probability of becoming zero, more than 0.

    Returns:
        (values, scaled or zero; bool mask of the same shape, true where they are not zero)
    """
    mask = _drawn(values, p)
    return dropout_backward(values, mask, p), mask


@dropout.register_fake
def _(values: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)


@torch.library.custom_op(
    "packlight::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def dropout_mask(values: torch.Tensor, p: float) -> torch.Tensor:
    """Return the mask that `dropout` draws for values; those are not read.

    Args:
        values: floating point, of any shape.
        p: probability of becoming zero, more than 0.
    """
    return _drawn(values, p)


def _drawn(values: torch.Tensor, p: float) -> torch.Tensor:
    mask = torch.empty_like(values, dtype=torch.bool)
    return mask.bernoulli_(1 - p) if p < 1 else mask.fill_(False)


@dropout_mask.register_fake
def _(values: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(values, dtype=torch.bool)


@torch.library.custom_op(
    "packlight::dropout_backward", mutates_args=(), tags=(torch.Tag.pointwise,)
)
def dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Return a gradient times the noise of `dropout`, rounded once as eager PyTorch does.

    Args:
        gradient: floating point.
        mask: what `dropout` returned, bool of the same shape.
        p: what it was given.
    """
    noise = torch.ones((), dtype=gradient.dtype).div_(1 - p).item() if p < 1 else 0.0
    result = torch.empty_like(gradient).copy_(mask.view(torch.uint8))
    return result.mul_(gradient).mul_(noise)


@dropout_backward.register_fake
def _(gradient: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(gradient)


def use_eager_dropout(joint: fx.GraphModule) -> None:
    """Have a joint graph's dropouts on the CPU run by the operators above.

    Args:
        joint: from AOTAutograd; it is changed.
    """
    for node in joint.graph.find_nodes(op="call_function", target=_aten.native_dropout.default):
        values, p, is_training = node.args
        backwards = _backwards_of(node)
        calls = [node, *backwards]
        if not is_training or not all(_is_like_its_first_argument(call) for call in calls):
            continue
        node.target, node.args = torch.ops.packlight.dropout.default, (values, p)
        for backward in backwards:
            backward.target = torch.ops.packlight.dropout_backward.default
            backward.args = (*backward.args[:2], p)
    joint.recompile()


def with_masks_apart(module: fx.GraphModule) -> fx.GraphModule:
    """Return a joint graph in which a dropout's mask is drawn by one call and used by another.

    Args:
        module: where `use_eager_dropout` was at work; stays as it is, and is returned where there
            is no dropout.
    """
    target = torch.ops.packlight.dropout.default
    if not module.graph.find_nodes(op="call_function", target=target):
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    masks: dict[fx.Node, fx.Node] = {}
    writer = GraphWriter(graph, fake_mode_of(module), {})
    for node in module.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if node.target is target:
            arguments = (copies[node.args[0]], node.args[1])
            masks[node] = writer.call(node, torch.ops.packlight.dropout_mask.default, arguments)
        elif source in masks and node.args[1] == 1:
            copies[node] = masks[source]
        elif source in masks:
            values, p = source.args
            product = torch.ops.packlight.dropout_backward.default
            copies[node] = writer.call(node, product, (copies[values], masks[source], p))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    copy_calling_convention(module.graph, graph)
    graph.lint()
    apart = GraphData(module, graph)
    apart.meta.update(module.meta)
    return apart


def _backwards_of(dropout: fx.Node) -> list[fx.Node]:
    """Return the calls that multiply a gradient by a dropout's mask and scale."""
    masks = [u for u in dropout.users if u.target is operator.getitem and u.args[1] == 1]
    backward = _aten.native_dropout_backward.default
    return [u for mask in masks for u in mask.users if u.target is backward]


def _is_like_its_first_argument(call: fx.Node) -> bool:
    """Whether the result lies in the CPU's memory as the operators above make it.

    Elsewhere, what follows was traced for other strides.
    """
    value = call.meta["val"]
    result = value[0] if isinstance(value, tuple) else value
    like = torch.empty_like(call.args[0].meta["val"])  # type: ignore[union-attr]
    return bool(result.device.type == "cpu" and result.stride() == like.stride())
