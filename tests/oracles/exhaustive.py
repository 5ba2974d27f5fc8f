"""The fastest schedule by trying everything: shortest paths over what may be in memory.

A state is (how many operations have run for the first time, which buffers are in memory). A move
runs one operation or frees one buffer; Dijkstra over seconds. It does not know of stages, so it
also allows what the MILP excludes: several runs of one operation between two first runs, in any
order. Exponential; for steps of a dozen operations.
"""

from __future__ import annotations

import heapq
import math
from itertools import count

from packlight.step import Operation, StepGraph


def fastest_seconds(graph: StepGraph, budget_bytes: int) -> float:
    """Return the seconds of the fastest schedule within the budget; infinity if there is none."""
    size = [0 if b.kind.is_resident else b.bytes for b in graph.buffers]
    resident = frozenset(b.id for b in graph.buffers if b.kind.is_resident)
    pinned = frozenset(graph.forward_outputs) & frozenset(graph.outputs)
    end = len(graph.operations)
    ties = count()
    best: dict[tuple[int, frozenset[int]], float] = {(0, frozenset()): 0.0}
    queue: list[tuple[float, int, int, frozenset[int]]] = [(0.0, next(ties), 0, frozenset())]

    def reach(seconds: float, first_runs: int, live: frozenset[int]) -> None:
        state = (first_runs, live)
        if seconds < best.get(state, math.inf):
            best[state] = seconds
            heapq.heappush(queue, (seconds, next(ties), first_runs, live))

    while queue:
        seconds, _, first_runs, live = heapq.heappop(queue)
        if seconds > best[first_runs, live]:
            continue
        if first_runs == end and live.issuperset(graph.outputs):
            return seconds
        for buffer in live - pinned:
            reach(seconds, first_runs, live - {buffer})
        if first_runs < end and (
            first_runs != graph.num_forward or live.issuperset(graph.forward_outputs)
        ):
            operation = graph.operations[first_runs]
            for after in _outcomes(operation, live, resident, size, budget_bytes):
                reach(seconds + operation.seconds, first_runs + 1, after)
        for operation in graph.operations[:first_runs]:
            if operation.can_recompute and operation.creates:
                for after in _outcomes(operation, live, resident, size, budget_bytes):
                    reach(seconds + operation.seconds, first_runs, after)
    return math.inf


def _outcomes(
    operation: Operation, live: frozenset[int], resident: frozenset[int], size: list[int],
    budget_bytes: int,
) -> list[frozenset[int]]:
    """Return what may be in memory after an operation that runs now; nothing if it cannot."""
    if not (live | resident).issuperset(operation.reads) or live & set(operation.creates):
        return []
    outcomes = []
    for overwrite in (None, *operation.overwrites):
        after = live | set(operation.creates)
        if overwrite is not None:
            after -= {overwrite[1]}
        held_bytes = sum(size[b] for b in after) + operation.workspace_bytes
        if held_bytes <= budget_bytes:
            outcomes.append(after)
    return outcomes
