"""Orders in which all that rests in another memory stays in this one, or all comes again.

What a search decides for each parameter in pieces, or on a disk, should be no slower than either.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.planner.routes import Routes
from packlight.step import StepGraph


def with_reads(
    graph: StepGraph, routes: Routes, order: Sequence[int], again: bool
) -> tuple[int, ...]:
    """Return an order of computations with a read before the first use of what rests elsewhere.

    Args:
        graph: whose computations have the order's numbers.
        routes: of what rests.
        order: without reads.
        again: the backward reads all of it anew.
    """
    there: set[int] = set()
    found: list[int] = []
    for index in order:
        for buffer in graph.operations[index].touches:
            if buffer in routes.resting and buffer not in there:
                there.add(buffer)
                found.append(routes.read(buffer).id)
        found.append(index)
        if again and index == graph.num_forward - 1:
            there.clear()
    return tuple(found)
