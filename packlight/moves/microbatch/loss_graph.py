"""What is asked of the nodes of a captured loss while its denominator is looked for."""

from __future__ import annotations

import operator

import torch
from torch import fx

from packlight.errors import MicrobatchError
from packlight.torch_internals.aot import descriptions, mutated_input


def operator_name(node: fx.Node) -> str:
    """Return the name of an ATen operator without its overload; empty for anything else."""
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return node.target._opname
    return ""


def reads_sizes_only(node: fx.Node) -> bool:
    """Whether a call takes a tensor for its sizes alone."""
    return operator_name(node).startswith("new_") or operator_name(node).endswith("_like")


def ancestors(nodes: list[fx.Node]) -> list[fx.Node]:
    """Return nodes and all that they are computed from."""
    found: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack.extend(node.all_input_nodes)
    return list(found)


def loss_of(output: fx.Node, num_forward_outputs: int, loss_index: int | None = None) -> fx.Node:
    """Return the node of the loss: the only forward output that is no new value of an input.

    Args:
        output: of a joint graph.
        num_forward_outputs: how many of its results belong to the forward.
        loss_index: which of them is the loss, where there are others beside it.
    """
    results = list(output.args[0])[:num_forward_outputs]  # type: ignore[arg-type]
    if loss_index is not None and isinstance(results[loss_index], fx.Node):
        loss: fx.Node = results[loss_index]
        return loss
    described = list(descriptions(output) or [None] * len(results))[:num_forward_outputs]
    losses = [
        r
        for r, d in zip(results, described, strict=True)
        if mutated_input(d) is None and isinstance(r, fx.Node)
    ]
    if len(losses) != 1 or losses[0].meta["val"].numel() != 1:
        shapes = [tuple(n.meta["val"].shape) for n in losses]
        raise MicrobatchError(f"the step returns {shapes} instead of one scalar", "the output", "")
    return losses[0]
