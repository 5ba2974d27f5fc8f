"""A part of a graph, and which of its calls lie between others."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


class Span:
    """Some nodes of a graph, in its order; only paths through them count.

    A deep model has hundreds of groups of neighbouring calls to ask about: an answer looks at what
    lies between the first and the last of a group, not at the whole graph.

    Args:
        nodes: in the order of the graph.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._nodes = tuple(nodes)
        self._positions = {node: i for i, node in enumerate(self._nodes)}
        self._inputs = [
            [self._positions[i] for i in node.all_input_nodes if i in self._positions]
            for node in self._nodes
        ]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._positions

    def ordered(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return those of some nodes that are in the span, in its order."""
        return [self._nodes[i] for i in self._places(nodes)]

    def between(self, members: Iterable[fx.Node], sources: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the nodes on a path from a source to a member that are no members, in order.

        Args:
            members: some nodes; those outside of the span do not count.
            sources: those of them at which paths begin.
        """
        ends, starts = self._places(members), self._places(sources)
        if not starts:
            return []
        first, last = starts[0], ends[-1]
        below, above = bytearray(last + 1), bytearray(last + 1)
        for i in starts:
            below[i] = True
        for i in range(first, last + 1):
            below[i] = below[i] or any(below[j] for j in self._inputs[i])
        for i in ends:
            above[i] = True
        for i in range(last, first, -1):
            if above[i]:
                for j in self._inputs[i]:
                    above[j] = True
        here = set(ends)
        return [
            self._nodes[i]
            for i in range(first, last + 1)
            if below[i] and above[i] and i not in here
        ]

    def _places(self, nodes: Iterable[fx.Node]) -> list[int]:
        return sorted(self._positions[n] for n in nodes if n in self._positions)
