"""One stage, planned: what it runs of a microbatch forward and backward, and what that holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Measure, read_joint_graph
from packlight.errors import InfeasibleBudgetError
from packlight.lower.emit import emit
from packlight.lower.program import Program
from packlight.pipeline.memory import StageBytes
from packlight.pipeline.split import StageGraph, Value
from packlight.planner import Planner
from packlight.step import Plan, live_after_forward

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

    def program(self) -> Program:
        """Return its two sections."""
        return emit(self.step, self.plan.schedule, (self.plan.schedule.num_forward,))

    @property
    def bytes(self) -> StageBytes:
        """What it holds."""
        graph, own = self.graph, self.step.graph
        kept = live_after_forward(own, self.plan.schedule)
        return StageBytes(
            frame=sum(own.buffers[b].bytes for b in kept if not own.buffers[b].memory),
            arriving=total_bytes(graph.arriving),
            running=self.plan.peak_bytes,
            leaving=total_bytes(graph.leaving),
            handing=total_bytes(graph.handing),
        )


def total_bytes(values: Sequence[Value]) -> int:
    """Return the bytes of values that cross."""
    return sum(value.num_bytes for value in values)


def read_stage(graph: StageGraph, measure: Measure) -> JointStep:
    """Return a stage's graph as a step of its own."""
    place = {primal: index for index, primal in enumerate(graph.primals)}
    num_leaving = len(graph.leaving)
    return read_joint_graph(
        graph.module, graph.num_forward_results, measure,
        mutated_primals=frozenset(place[primal] for primal in graph.written),
        pinned_outputs=lambda index: index >= num_leaving + len(graph.written),
    )


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
