"""What is asked of the nodes of a captured loss while its denominator is looked for."""

from __future__ import annotations

import operator

import torch
from torch import fx

from packlight.errors import MicrobatchError
from packlight.torch_internals import descriptions, mutated_input


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


def loss_of(output: fx.Node, num_forward_outputs: int) -> fx.Node:
    """Return the node of the loss: the only forward output that is no new value of an input."""
    results = list(output.args[0])[:num_forward_outputs]  # type: ignore[arg-type]
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
