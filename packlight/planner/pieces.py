"""Pieces of a step planned together: what one keeps, the next has less of.

A loss that breaks is several graphs with Python between them. What happened in one step is a
`Path`: which sections ran, a forward or a backward of some piece each, and what Python held and
allocated before, between and after them. Here a path becomes one graph: the pieces' operations in
the order of the sections, and for each stretch of Python an operation that runs once, holds what
was seen to be held there and needs as workspace what was allocated for a moment. So the planner
that plans a whole step plans the pieces, and `simulate` judges them, Python included.

A schedule of that graph is taken apart again into one for each run of a piece, which needs nothing
of the others: whatever Python does in another step, each backward has what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from packlight.errors import InfeasibleBudgetError
from packlight.planner.path import Gap, Order, Path, PathPlan, PieceRun, Section, tangents
from packlight.planner.plain import schedule_from_order
from packlight.planner.plan import least_peak_bytes, plan_schedule
from packlight.planner.smallest import smallest_schedules
from packlight.step import (
    Buffer,
    BufferKind,
    Operation,
    OperationKind,
    Phase,
    Plan,
    Schedule,
    StepGraph,
    Timeline,
    simulate,
)

PYTHON = "packlight.python"
# Taken apart, a schedule may hold a little more than it did: then less is asked for.
MAX_ATTEMPTS = 3


def keeping_little(graph: StepGraph) -> Order:
    """Return an order of a piece with a small peak that keeps little for its backward.

    What the other pieces need stands in for them between its forward and its backward: as much as
    the largest of its own operations.
    """
    results = {b: b for b in graph.forward_outputs if not graph.buffers[b].kind.is_resident}
    nothing, everything = frozenset[int](), frozenset(results)
    path = Path(
        (PieceRun(graph, results),),
        (Section(0, True), Section(0, False)),
        (
            Gap(0, 0, nothing), Gap(0, least_peak_bytes(graph), everything), Gap(0, 0, nothing),
        ),
    )
    stitched = Stitched(path)
    schedule = smallest_schedules(stitched.graph)[0]
    (order,) = stitched.taken_apart(schedule, [((), ())])
    return order


def plan_path(path: Path, budget_bytes: int | None, known: Sequence[Order]) -> PathPlan:
    """Return the fastest way found to run a path within a budget.

    Args:
        path: as it was seen.
        budget_bytes: for all that it allocates, Python's part included; None for no limit.
        known: orders that were seen to run, one for each run; they are taken if they fit and
            nothing better is found.

    Raises:
        InfeasibleBudgetError: with the smallest budget that was found, of all that the path
            allocates.
    """
    stitched = Stitched(path)
    first = stitched.schedule(known)
    limit = budget_bytes
    for _ in range(MAX_ATTEMPTS):
        plan = plan_schedule(stitched.graph, limit, known=[first])
        orders = stitched.taken_apart(plan.schedule, known)
        schedule = stitched.schedule(orders)
        timeline = simulate(stitched.graph, schedule)
        if budget_bytes is None or timeline.peak_bytes <= budget_bytes:
            return PathPlan(orders, _judged(plan, schedule, timeline, budget_bytes))
        assert limit is not None
        limit -= timeline.peak_bytes - budget_bytes
    timeline = simulate(stitched.graph, first)
    assert budget_bytes is not None
    if timeline.peak_bytes > budget_bytes:
        raise InfeasibleBudgetError(
            budget_bytes, timeline.peak_bytes, "the pieces together", [], ""
        )
    return PathPlan(tuple(known), _judged(plan, first, timeline, budget_bytes))


def _judged(plan: Plan, schedule: Schedule, timeline: Timeline, budget_bytes: int | None) -> Plan:
    bound_seconds = min(plan.bound_seconds, timeline.seconds)
    return replace(
        plan, schedule=schedule, budget_bytes=budget_bytes, peak_bytes=timeline.peak_bytes,
        seconds=timeline.seconds,
        termination=replace(plan.termination, bound_seconds=bound_seconds),
    )


class Stitched:
    """A path as one graph, and back.

    Args:
        path: as it was seen.

    Attributes:
        graph: of all of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffers: list[Buffer] = []
        self._operations: list[Operation] = []
        # Behind each operation: the run and its operation there; None for Python.
        self._origins: list[tuple[int, int] | None] = []
        self._shared: dict[int, int] = {}
        self._made: set[int] = set()
        self._order_number: int | None = None
        self.graph = self._stitch()

    @cached_property
    def _number_of(self) -> dict[tuple[int, int], int]:
        return {origin: i for i, origin in enumerate(self._origins) if origin is not None}

    @cached_property
    def _gap_numbers(self) -> list[int]:
        return [i for i, origin in enumerate(self._origins) if origin is None]

    # -- one graph

    def _stitch(self) -> StepGraph:
        path, places = self.path, [self._places(run) for run in self.path.runs]
        pieces_of_held = _lives([gap.held_bytes for gap in path.gaps])
        self._last_held = {s: n for n, gap in enumerate(path.gaps) for s in gap.holds}
        held = [
            (self._new_buffer(size, BufferKind.ACTIVATION, "held by Python"), born, dies)
            for size, born, dies in pieces_of_held
        ]
        num_forward = 0
        for n in range(len(path.gaps)):
            section = path.sections[n] if n < len(path.sections) else None
            born = [b for b, start, _ in held if start == n]
            dying = [b for b, _, end in held if end == n]
            is_forward = not num_forward and (section is None or section.is_forward)
            if not is_forward and not num_forward:
                num_forward = len(self._operations)
            self._add_python(n, born, dying, is_forward)
            if section is not None:
                self._add_section(section, places[section.run])
        left = [b for b, _, end in held if end is None]
        end = {self._shared[s] for s in path.gaps[-1].holds if s in self._shared}
        return StepGraph(
            tuple(self._operations), tuple(self._buffers),
            num_forward or len(self._operations), (), (*left, *sorted(end & self._made)),
        )

    def _new_buffer(self, num_bytes: int, kind: BufferKind, name: str) -> int:
        self._buffers.append(Buffer(len(self._buffers), num_bytes, kind, name))
        return len(self._buffers) - 1

    def _places(self, run: PieceRun) -> list[int]:
        """Return for each buffer of a run which one of the whole it is."""
        arriving = {b for o in tangents(run.graph) for b in run.graph.operations[o].creates}
        places = []
        for buffer in run.graph.buffers:
            storage = run.shared.get(buffer.id)
            if storage is not None:
                if storage not in self._shared:
                    kind = buffer.kind
                    if kind.is_resident:
                        kind = BufferKind.ACTIVATION
                    self._shared[storage] = self._new_buffer(buffer.bytes, kind, buffer.name)
                places.append(self._shared[storage])
            else:  # tangents that Python has made are its own
                kind = BufferKind.INPUT if buffer.id in arriving else buffer.kind
                places.append(self._new_buffer(buffer.bytes, kind, buffer.name))
        return places

    def _add_python(
        self, n: int, born: Sequence[int], dying: Sequence[int], is_forward: bool
    ) -> None:
        gap = self.path.gaps[n]
        # What is held when a section begins, and no more before the next, dies in between.
        last = {self._shared[s] for s, held in self._last_held.items() if held == n - 1}
        reads = {*dying, *(last & self._made)}
        if n:  # what the section before was given, and what it has returned
            reads |= self._boundary & self._made
        if self._order_number is not None:
            reads.add(self._order_number)
        self._order_number = self._new_buffer(0, BufferKind.ACTIVATION, "order")
        created = sum(self._buffers[b].bytes for b in born)
        self._append(
            Operation(
                len(self._operations), PYTHON, tuple(sorted(reads)),
                (*born, self._order_number), 0.0, max(0, gap.peak_bytes - created),
                Phase.FORWARD if is_forward else Phase.BACKWARD, can_recompute=False,
                layer=f"Python {n + 1} of {len(self.path.gaps)}",
            ),
            None,
        )

    def _add_section(self, section: Section, places: Sequence[int]) -> None:
        run = self.path.runs[section.run]
        graph, shared = run.graph, {places[b] for b in run.shared}
        assert self._order_number is not None
        self._boundary: set[int] = set()
        for operation in graph.operations:
            if (operation.id < graph.num_forward) is not section.is_forward:
                continue
            if operation.kind is OperationKind.TANGENT:
                self._boundary.update(places[b] for b in operation.creates)
                continue
            reads = [places[b] for b in operation.reads]
            creates = [places[b] for b in operation.creates]
            self._boundary |= shared.intersection((*reads, *creates))
            if all(self._buffers[b].kind.is_resident for b in reads):
                reads.append(self._order_number)  # it runs after the Python before it
            overwrites = tuple(
                (places[made], places[read])
                for made, read in operation.overwrites if places[read] not in shared
            )
            self._append(
                replace(
                    operation, id=len(self._operations), reads=tuple(reads),
                    creates=tuple(creates), overwrites=overwrites,
                    can_recompute=operation.can_recompute and shared.isdisjoint(creates),
                ),
                (section.run, operation.id),
            )

    def _append(self, operation: Operation, origin: tuple[int, int] | None) -> None:
        self._operations.append(operation)
        self._origins.append(origin)
        self._made.update(operation.creates)

    # -- and back

    def schedule(self, orders: Sequence[Order]) -> Schedule:
        """Return the schedule in which each run has its own order."""
        order: list[int] = []
        num_forward = 0
        numbers, number_of = self._gap_numbers, self._number_of
        for n, python in enumerate(numbers):
            if python < self.graph.num_forward:
                num_forward = len(order) + 1
            order.append(python)
            if n == len(self.path.sections):
                break
            section = self.path.sections[n]
            mine = orders[section.run][0 if section.is_forward else 1]
            order += [number_of[section.run, operation] for operation in mine]
            if python < self.graph.num_forward:
                num_forward = len(order)
        return schedule_from_order(self.graph, order, num_forward)

    def taken_apart(self, schedule: Schedule, known: Sequence[Order]) -> tuple[Order, ...]:
        """Return the order of each run in a schedule of the whole.

        What a schedule brings back of a run before its backward begins, the run brings back then.
        A run whose backward the path does not know stays as it was known.
        """
        come_back = {s.run for s in self.path.sections if not s.is_forward}
        forward_of = {s.run: n for n, s in enumerate(self.path.sections) if s.is_forward}
        orders: list[tuple[list[int], list[int]]] = [([], []) for _ in self.path.runs]
        seen: set[int] = set()
        now = -1
        for number in schedule.runs():
            origin = self._origins[number]
            if origin is None:
                now += 1
                continue
            run, operation = origin
            is_first = number not in seen
            seen.add(number)
            is_of_forward = operation < self.path.runs[run].graph.num_forward
            in_forward = is_of_forward and (is_first or now <= forward_of[run])
            orders[run][0 if in_forward else 1].append(operation)
        return tuple(
            (tuple(forward), tuple(backward)) if run in come_back else known[run]
            for run, (forward, backward) in enumerate(orders)
        )


def _lives(held_bytes: Sequence[int]) -> list[tuple[int, int, int | None]]:
    """Return (bytes, when they come, when they go) that add up to what is held at each time.

    >>> _lives([100, 300, 50])
    [(200, 1, 2), (50, 0, 2), (50, 0, None)]
    """
    held: list[tuple[int, int]] = []
    found: list[tuple[int, int, int | None]] = []
    total = 0
    for now, wanted in enumerate(held_bytes):
        if wanted > total:
            held.append((wanted - total, now))
        excess = total - wanted
        while excess > 0:
            size, born = held.pop()
            gone = min(size, excess)
            found.append((gone, born, now))
            if size > gone:
                held.append((size - gone, born))
            excess -= gone
        total = wanted
    return [*found, *((size, born, None) for size, born in held)]
