"""Which nodes of a joint graph belong to the backward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from packlight.torch_internals.aot import is_tangent, is_traced_in_backward


def after_tangents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the tangents and all that depends on one.

    Args:
        nodes: of a joint graph, in order.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        if is_tangent(node) or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def forward_calls(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the calls that neither need a tangent nor were traced in the backward.

    Args:
        nodes: of a joint graph, in order.
    """
    nodes = list(nodes)
    late = after_tangents(nodes)
    return {
        n for n in nodes
        if n.op == "call_function" and n not in late and not is_traced_in_backward(n)
    }
