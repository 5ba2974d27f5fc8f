"""The fastest schedules of a rank's stages that fit together.

A rank holds what each microbatch under way keeps, many times over, and what one of them needs while
it runs, once. The planner of one step knows a peak alone. What a microbatch may keep is told to it
as bytes that something else takes between forward and backward (and between the halves of the
backward): so the same search weighs keeping against recomputing, and brings down what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from packlight.capture.joint import JointStep
from packlight.errors import InfeasibleBudgetError
from packlight.pipeline.ahead import recomputing_ahead
from packlight.pipeline.memory import StageBytes
from packlight.pipeline.split import StageGraph
from packlight.pipeline.stage import PlannedStage
from packlight.planner import plain_schedule
from packlight.planner.search import LocalSearch
from packlight.planner.smallest import priced
from packlight.step import OperationKind, Schedule, StepGraph

# What a microbatch may keep, in parts of what the plain step does.
KEPT = (0.75, 0.5, 0.25, 0.05)
# Where the least is looked for: what it keeps, and peaks in parts of the plain one.
LEAST_KEPT, LEAST_PEAKS = (1.0, 0.25, 0.05), (1.0, 0.8, 0.5, 0.3)

Most = Callable[[Mapping[int, StageBytes]], int]


@dataclass(frozen=True)
class _Together:
    """Stages of one rank, planned.

    Attributes:
        stages: they.
        peak_bytes: the most that the rank then holds.
    """

    stages: dict[int, PlannedStage]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Of a microbatch in all of them."""
        return sum(sum(stage.seconds) for stage in self.stages.values())


def plan_stages(
    own: Mapping[int, tuple[StageGraph, JointStep]],
    budget_bytes: int | None,
    most: Most,
    static: Sequence[tuple[str, int]],
    ahead: Collection[int] = (),
) -> dict[int, PlannedStage]:
    """Return the fastest plans of a rank's stages, of those looked at, that fit together.

    All stages keep the same part of what they do plain at most, and each is as fast as the peak
    lets that is then left.

    Args:
        own: the rank's stages.
        budget_bytes: of the rank, None for no limit.
        most: what the rank holds at most with stages that hold so much.
        static: (name, bytes) of what it holds throughout, for the error.
        ahead: stages that bring back what their backward needs before that begins.

    Raises:
        InfeasibleBudgetError: even the smallest plans hold more; in terms of the rank.
    """
    plans = _Plans(own, most, ahead)
    if budget_bytes is None or plans.plain.peak_bytes <= budget_bytes:
        return plans.plain.stages
    fitting: list[_Together] = []
    for found in plans.keeping_less(budget_bytes):
        if found.peak_bytes <= budget_bytes:
            fitting.append(found)
            if found.seconds > fitting[0].seconds:  # less still is slower still
                break
    if not fitting:
        least = plans.keeping_least()
        smallest = min(found.peak_bytes for found in least)
        fitting = [found for found in least if found.peak_bytes <= budget_bytes]
        if not fitting:
            under_way = smallest - sum(size for _, size in static)
            parts = [*static, ("microbatches under way", under_way)]
            raise InfeasibleBudgetError(
                budget_bytes, smallest, "the fullest moment of a rank",
                sorted(parts, key=lambda part: -part[1]),
                "more ranks, or more and smaller microbatches, take less each",
            )
    return min(fitting, key=lambda found: (found.seconds, found.peak_bytes)).stages


class _Plans:
    """Plans of all stages of a rank."""

    def __init__(
        self,
        own: Mapping[int, tuple[StageGraph, JointStep]],
        most: Most,
        ahead: Collection[int],
    ) -> None:
        self._own, self._most, self._ahead = own, most, ahead
        self._bare = {k: plain_schedule(step.graph) for k, (_, step) in own.items()}
        self.plain = self._together(self._bare)

    def keeping_less(self, budget_bytes: int) -> Iterator[_Together]:
        """Yield plans that keep parts of what the plain ones do, as fast as the budget then lets.

        They may keep more than they were to, and so not fit.
        """
        for part in KEPT:
            held = {k: stage.bytes.keeping(part) for k, stage in self.plain.stages.items()}
            room = budget_bytes - self._most(held)
            rooms = dict.fromkeys(held, room)
            found = self._within(rooms, held, lambda graph: graph) if room > 0 else None
            if found is not None:
                yield found

    def keeping_least(self) -> list[_Together]:
        """Return plans that keep little, and have small peaks, whatever operations take.

        The same in every process: a budget that was named is enough when it is asked for.
        """
        least = [self.plain]
        plain = {k: max(stage.bytes.running) for k, stage in self.plain.stages.items()}
        for part in LEAST_KEPT:
            before = min(found.peak_bytes for found in least)
            held = {k: stage.bytes.keeping(part) for k, stage in self.plain.stages.items()}
            for of_peak in LEAST_PEAKS:
                rooms = {k: int(of_peak * peak) for k, peak in plain.items()}
                found = self._within(rooms, held, _priced)
                if found is None:
                    break
                least.append(found)
            if part < LEAST_KEPT[0] and min(found.peak_bytes for found in least) == before:
                break
        return least

    def _within(
        self,
        rooms: Mapping[int, int],
        held: Mapping[int, StageBytes],
        with_prices: Callable[[StepGraph], StepGraph],
    ) -> _Together | None:
        """Return the fastest plans found with peaks within rooms that keep at most so much.

        Stages for which there is none stay plain; None where that is all of them.
        """
        schedules = {}
        for k, (_, step) in self._own.items():
            room, kept = rooms[k], held[k].kept
            bounded = _taking(step.graph, room - kept[0], room - kept[-1])
            if found := LocalSearch(with_prices(bounded)).fastest(room):
                schedules[k] = found[-1].schedule
        return self._together({**self._bare, **schedules}) if schedules else None

    def _together(self, schedules: Mapping[int, Schedule]) -> _Together:
        stages = {k: self._planned(k, schedule) for k, schedule in schedules.items()}
        return _Together(stages, self._most({k: stage.bytes for k, stage in stages.items()}))

    def _planned(self, stage: int, schedule: Schedule) -> PlannedStage:
        graph, step = self._own[stage]
        if stage not in self._ahead:
            return PlannedStage(graph, step, schedule)
        return PlannedStage(graph, step, *recomputing_ahead(step.graph, schedule))


def _priced(graph: StepGraph) -> StepGraph:
    """Return a step whose operations all take the same."""
    return next(priced(graph))


def _taking(graph: StepGraph, ahead_bytes: int, between_bytes: int) -> StepGraph:
    """Return a step in which something else takes memory for a moment.

    Args:
        graph: of a stage.
        ahead_bytes: when the backward begins: as its first gradient arrives.
        between_bytes: when the first half of the backward is over, if it is in halves.
    """
    arrival = next((o.id for o in graph.computations if o.kind is OperationKind.TANGENT), None)
    operations = []
    for operation in graph.computations:
        touched = sum(graph.buffers[b].bytes for b in (*operation.reads, *operation.creates))
        if operation.id == arrival:
            operation = replace(operation, workspace_bytes=max(0, ahead_bytes - touched))
        elif operation.kind is OperationKind.HAND_ON:
            operation = replace(operation, workspace_bytes=max(0, between_bytes - touched))
        operations.append(operation)
    return replace(graph, operations=tuple(operations))
