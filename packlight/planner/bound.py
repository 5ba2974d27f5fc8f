"""A lower bound on the seconds of every schedule within a budget."""

from __future__ import annotations

import numpy as np

from packlight.step import StepGraph


def lower_bound_seconds(graph: StepGraph, budget_bytes: int | None) -> float:
    """Return seconds that no schedule within a budget can beat.

    Every operation runs at least once. While a backward operation runs, the memory that it does not
    need itself holds some of the forward buffers that later backward operations read; the makers of
    all others must run again. The cheapest choice of what to hold is a knapsack, and its fractional
    relaxation, largest seconds per byte first (Dantzig 1957), bounds it. The best such position counts.

    Cost: O(n log n) per position looked at; positions are sampled in long steps.
    """
    plain = graph.seconds
    if budget_bytes is None:
        return plain
    num = graph.num_forward
    resident = [b.kind.is_resident for b in graph.buffers]
    last_read = {b: o.id for o in graph.operations for b in o.reads if not resident[b]}
    pinned = set(graph.outputs)
    maker = {b: o.id for o in graph.operations for b in o.creates}
    best = 0.0
    positions = list(range(num, len(graph.operations)))
    stride = max(1, len(positions) // 64)
    for position in positions[::stride]:
        operation = graph.operations[position]
        in_use = {b for b in (*operation.reads, *operation.creates) if not resident[b]}
        in_use |= {b for b in pinned if maker[b] < position}
        room = budget_bytes - operation.workspace_bytes
        room -= sum(graph.buffers[b].bytes for b in in_use)
        best = max(best, _cheapest_rerun(graph, position, in_use, last_read, room, resident))
    return plain + best


def _cheapest_rerun(
    graph: StepGraph,
    position: int,
    in_use: set[int],
    last_read: dict[int, int],
    room: int,
    resident: list[bool],
) -> float:
    seconds, sizes = [], []
    for operation in graph.operations[: graph.num_forward]:
        size = sum(
            graph.buffers[b].bytes for b in operation.creates
            if last_read.get(b, -1) > position and b not in in_use
        )
        if size > 0:
            seconds.append(operation.seconds)
            sizes.append(size)
    if not sizes or sum(sizes) <= room:
        return 0.0
    cost, size_array = np.array(seconds), np.array(sizes, dtype=np.float64)
    order = np.argsort(-cost / size_array, kind="stable")
    cost, size_array = cost[order], size_array[order]
    filled = np.cumsum(size_array)
    held = np.clip((max(room, 0) - (filled - size_array)) / size_array, 0.0, 1.0)
    return float((cost * (1.0 - held)).sum())
