"""A run between its forward and its backward, made smaller.

What a forward has kept cannot be changed any more, but it can be let go of: the backward of another
order of the same piece is taken, one that keeps less, and what that finds missing is recomputed
from what was kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from packlight.errors import ScheduleError
from packlight.planner.path import Order, piece_schedule
from packlight.step import (
    Action,
    Operation,
    OperationKind,
    Schedule,
    StepGraph,
    live_after_forward,
    simulate,
)


def with_smaller_backward(
    graph: StepGraph, order: Order, wanted: Order, kept: Collection[int]
) -> Order | None:
    """Return an order with the same forward that keeps about as little as another one.

    Args:
        graph: of the piece.
        order: whose forward has run.
        wanted: whose backward is to run.
        kept: the buffers whose values are there.

    Returns:
        An order that needs nothing between forward and backward but some of `kept`; None if there
        is none.
    """
    walk = _Walk(graph, kept)
    try:
        shrunk = order[0], tuple(walk.backward_of(piece_schedule(graph, wanted)))
        simulate(graph, piece_schedule(graph, shrunk))
    except ScheduleError:
        return None
    return shrunk


def backward_peak_bytes(graph: StepGraph, schedule: Schedule) -> int:
    """Return the peak of a schedule's backward, what is kept for it included."""
    live = (0, *simulate(graph, schedule).live_bytes)
    peak_bytes = live[schedule.num_forward]
    for index in range(schedule.num_forward, len(schedule.instructions)):
        instruction = schedule.instructions[index]
        if instruction.action is Action.RUN:
            during = live[index + 1] + graph.operations[instruction.target].workspace_bytes
            peak_bytes = max(peak_bytes, during)
    return peak_bytes


class _Walk:
    """Goes through a backward and sees that every operation finds what it reads."""

    def __init__(self, graph: StepGraph, kept: Collection[int]) -> None:
        self.graph, self.kept = graph, set(kept) | graph.resident
        # What can be had from what was kept, by computing it or as it is.
        self.possible = set(self.kept)
        self.recomputed: dict[int, Operation] = {}
        for operation in graph.operations[: graph.num_forward]:
            if operation.can_recompute and self.possible.issuperset(operation.reads):
                self.possible.update(operation.creates)
                self.recomputed.update(dict.fromkeys(operation.creates, operation))

    def backward_of(self, schedule: Schedule) -> list[int]:
        """Return the operations of a schedule's backward, with recomputations where they lack."""
        graph = self.graph
        live = self.kept & (live_after_forward(graph, schedule) | graph.resident)
        operations: list[int] = []
        for index in range(schedule.num_forward, len(schedule.instructions)):
            instruction = schedule.instructions[index]
            if instruction.action is Action.FREE:
                live.discard(instruction.target)
                continue
            operation = graph.operations[instruction.target]
            if operation.kind is not OperationKind.TANGENT:
                operations += self._missing(operation, live, index)
                live.update(operation.reads)  # while the schedule does not free it
                operations.append(operation.id)
            live.update(operation.creates)
            if instruction.overwrite is not None:
                live.discard(instruction.overwrite[1])
        return operations

    def _missing(self, operation: Operation, live: Collection[int], index: int) -> Sequence[int]:
        """Return what has to run again before an operation, in order."""
        needed: set[int] = set()
        seen, wanted = set(live), list(operation.reads)
        while wanted:
            buffer = wanted.pop()
            if buffer in seen:
                continue
            seen.add(buffer)
            maker = self.recomputed.get(buffer)
            if maker is not None and maker.id not in needed:
                needed.add(maker.id)
                wanted += maker.reads
            elif maker is None and buffer not in self.kept:
                raise ScheduleError(index, f"buffer {buffer} is lost")
        return sorted(needed)
