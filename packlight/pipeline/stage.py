"""One stage, planned: what it runs of a microbatch forward and backward, and what that holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Measure, read_joint_graph
from packlight.cluster.instructions import Work
from packlight.lower.emit import emit
from packlight.lower.program import Program
from packlight.pipeline.halves import hand_on_position, in_halves
from packlight.pipeline.memory import StageBytes
from packlight.pipeline.split import StageGraph, Value
from packlight.step import Action, OperationKind, Schedule, StepGraph, simulate


@dataclass(frozen=True)
class PlannedStage:
    """A stage and how it runs.

    Attributes:
        graph: what crosses, and which primals it takes.
        step: the captured stage.
        schedule: of one microbatch.
        ahead: where its backward begins, if what it brings back ahead of that is a section.
    """

    graph: StageGraph
    step: JointStep
    schedule: Schedule
    ahead: int | None = None

    @property
    def num_reruns(self) -> int:
        """How many operations run again."""
        return sum(self.step.graph.reruns(self.schedule).values())

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """Of each of its sections."""
        done = (0.0, *simulate(self.step.graph, self.schedule).done_seconds)
        ends = [done[cut] for cut in (0, *self.cuts, len(self.schedule.instructions))]
        return tuple(b - a for a, b in pairwise(ends))

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """What its sections are."""
        is_halved = hand_on_position(self.step, self.schedule) is not None
        backward = (Work.INPUT, Work.WEIGHT) if is_halved else (Work.BACKWARD,)
        return (Work.FORWARD, *((Work.RECOMPUTE,) if self.ahead is not None else ()), *backward)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Where its sections end, but for the last one."""
        ends = self.schedule.num_forward, self.ahead, hand_on_position(self.step, self.schedule)
        return tuple(end for end in ends if end is not None)

    def program(self) -> Program:
        """Return its sections."""
        graph, is_halved = self.graph, Work.WEIGHT in self.works
        num_handed_on = len(graph.handing) + graph.num_early if is_halved else 0
        return emit(self.step, self.schedule, self.cuts, num_handed_on)

    @cached_property
    def bytes(self) -> StageBytes:
        """What it holds."""
        graph, own = self.graph, self.step.graph
        return StageBytes(
            works=self.works,
            running=tuple(section_peaks(own, self.schedule, self.cuts)),
            kept=tuple(live_at(own, self.schedule, cut) for cut in self.cuts),
            arriving=total_bytes(graph.arriving),
            leaving=total_bytes(graph.leaving),
            handing=total_bytes(graph.handing),
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
