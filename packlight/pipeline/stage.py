"""One stage, planned: what it runs of a microbatch forward and backward, and what that holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Measure, read_joint_graph
from packlight.errors import InfeasibleBudgetError
from packlight.lower.emit import emit
from packlight.lower.program import Program
from packlight.pipeline.halves import hand_on_position, in_halves
from packlight.pipeline.memory import StageBytes
from packlight.pipeline.split import StageGraph, Value
from packlight.planner import Planner
from packlight.step import Action, OperationKind, Plan, Schedule, StepGraph, simulate

STEPS = 16  # between a stage's smallest plan and its plain one


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its plan.

    Attributes:
        graph: what crosses, and which primals it takes.
        step: the captured stage.
        plan: of one microbatch.
    """

    graph: StageGraph
    step: JointStep
    plan: Plan

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Where its sections end: the forward, and the first half of a backward in halves."""
        border = hand_on_position(self.step, self.plan.schedule)
        forward = self.plan.schedule.num_forward
        return (forward,) if border is None else (forward, border)

    def program(self) -> Program:
        """Return its sections."""
        graph, is_halved = self.graph, len(self.cuts) > 1
        num_handed_on = len(graph.handing) + graph.num_early if is_halved else 0
        return emit(self.step, self.plan.schedule, self.cuts, num_handed_on)

    @cached_property
    def bytes(self) -> StageBytes:
        """What it holds."""
        graph, schedule = self.graph, self.plan.schedule
        peaks = section_peaks(self.step.graph, schedule, self.cuts)
        held = [live_at(self.step.graph, schedule, cut) for cut in self.cuts]
        return StageBytes(
            frame=held[0],
            arriving=total_bytes(graph.arriving),
            forward=peaks[0],
            backward=peaks[1],
            leaving=total_bytes(graph.leaving),
            handing=total_bytes(graph.handing),
            held=held[1] if len(held) > 1 else 0,
            weight=peaks[2] if len(peaks) > 2 else 0,
        )

    @cached_property
    def aliased(self) -> frozenset[int]:
        """Of the gradients, the primals of those that lie where another result does."""
        of = self.step.buffer_of_node
        buffers = [of[node] for node in self.step.backward_results]
        counts = Counter(buffers)
        gradients = zip(self.graph.gradients, buffers[len(self.graph.handing) :], strict=True)
        return frozenset(primal for primal, buffer in gradients if counts[buffer] > 1)


def section_peaks(graph: StepGraph, schedule: Schedule, cuts: Sequence[int]) -> list[int]:
    """Return the peak of each section of a schedule without transfers, whatever it takes counted.

    Args:
        graph: the step.
        schedule: of it.
        cuts: where sections end.
    """
    live = (0, *simulate(graph, schedule).live_bytes)
    ends = [*cuts, len(schedule.instructions)]
    peaks = []
    for start, end in zip((0, *cuts), ends, strict=True):
        most = live[start]
        for index in range(start, end):
            instruction = schedule.instructions[index]
            if instruction.action is Action.RUN:
                workspace = graph.operations[instruction.target].workspace_bytes
                most = max(most, live[index + 1] + workspace, live[index])
        peaks.append(most)
    return peaks


def live_at(graph: StepGraph, schedule: Schedule, cut: int) -> int:
    """Return the bytes in memory at a cut, once what goes right behind it is gone."""
    while cut < len(schedule.instructions) and schedule.instructions[cut].action is Action.FREE:
        cut += 1
    return (0, *simulate(graph, schedule).live_bytes)[cut]


def total_bytes(values: Sequence[Value]) -> int:
    """Return the bytes of values that cross."""
    return sum(value.num_bytes for value in values)


def read_stage(
    graph: StageGraph, measure: Measure, is_halved: bool = False
) -> tuple[StageGraph, JointStep]:
    """Return a stage and its graph as a step of its own.

    Args:
        graph: of the stage.
        measure: observes a call, as for `read_joint_graph`.
        is_halved: its backward is to run in halves.
    """
    place = {primal: index for index, primal in enumerate(graph.primals)}
    num_leaving = len(graph.leaving)
    step = read_joint_graph(
        graph.module, graph.num_forward_results, measure,
        mutated_primals=frozenset(place[primal] for primal in graph.written),
        pinned_outputs=lambda index: index >= num_leaving + len(graph.written),
    )
    # Gradients that have arrived are this stage's alone: they go with their last reader.
    results = {step.buffer_of_node[node] for node in step.backward_results}
    arrived = {
        b for o in step.graph.computations if o.kind is OperationKind.TANGENT for b in o.creates
    }
    outputs = tuple(b for b in step.graph.outputs if b in results or b not in arrived)
    step = replace(step, graph=replace(step.graph, outputs=outputs))
    return in_halves(graph, step) if is_halved else (graph, step)


def plan_stages(
    own: Mapping[int, tuple[StageGraph, JointStep]],
    budget_bytes: int | None,
    most: Callable[[Mapping[int, StageBytes]], int],
    static: Sequence[tuple[str, int]],
) -> dict[int, PlannedStage]:
    """Return the fastest plans of a rank's stages that fit together.

    All of them get the same share of what lies between their smallest and their plain peaks: the
    largest that fits, to a sixteenth.

    Args:
        own: the rank's stages.
        budget_bytes: of the rank, None for no limit.
        most: what the rank holds at most with stages that hold so much.
        static: (name, bytes) of what it holds throughout, for the error.

    Raises:
        InfeasibleBudgetError: even the smallest plans hold more; in terms of the rank.
    """
    planners = {k: Planner(step.graph) for k, (_, step) in own.items()}

    def planned(share: float) -> tuple[dict[int, PlannedStage], int]:
        stages = {
            k: PlannedStage(graph, step, _at_share(planners[k], share))
            for k, (graph, step) in own.items()
        }
        return stages, most({k: stage.bytes for k, stage in stages.items()})

    best, peak = planned(1.0)
    if budget_bytes is None or peak <= budget_bytes:
        return best
    best, peak = planned(0.0)
    if peak > budget_bytes:
        parts = [*static, ("microbatches under way", peak - sum(size for _, size in static))]
        raise InfeasibleBudgetError(
            budget_bytes, peak, "the fullest moment of a rank",
            sorted(parts, key=lambda part: -part[1]),
            "more ranks, or more and smaller microbatches, take less each",
        )
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        tried, peak = planned(middle / STEPS)
        if peak <= budget_bytes:
            low, best = middle, tried
        else:
            high = middle
    return best


def _at_share(planner: Planner, share: float) -> Plan:
    if share >= 1:
        return planner.plan(None)
    smallest = planner.smallest_plan()
    between = planner.plain_peak_bytes - smallest.peak_bytes
    return planner.plan(smallest.peak_bytes + int(share * between)) if share else smallest
