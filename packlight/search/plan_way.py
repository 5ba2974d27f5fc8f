"""One way to run the step: captured, rewritten, completed, its times known, planned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from packlight.capture.joint import read_joint_graph
from packlight.capture.step_capture import CapturedLoss, LossFunction, StepCapture
from packlight.capture.whole_step import Consumption, WholeStep
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError
from packlight.lower.emit import emit
from packlight.moves.microbatch.split import LossWeight, num_rows, split
from packlight.moves.precision import blaming_precision, naming_missing_kernels
from packlight.moves.stream.streamed import Streaming
from packlight.planner import least_peak_bytes, plan_whole_step
from packlight.search.rehearse import (
    fits,
    rehearse,
    typical_seconds,
    with_estimated_seconds,
)
from packlight.search.rewriting import CHUNK_SHARE, Rewriter
from packlight.search.step_costs import StepCosts, streamed_primals
from packlight.search.ways import Part, Request, Rewriting, Way
from packlight.step import Device, Plan, StepMemory


class HopelessError(Exception):
    """A single operation of a way needs too much: no schedule has to be looked for."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What tells one way to run the step from another.

    Attributes:
        num_microbatches: per update.
        rewriting: of the captured graph.
        streaming: what lies on a tier between its uses.
    """

    num_microbatches: int = 1
    rewriting: Rewriting = Rewriting()
    streaming: Streaming = field(default_factory=Streaming)


@dataclass
class Captured:
    """One captured size of microbatch, while ways to run it are looked at."""

    batch: Any
    capture: StepCapture
    loss: CapturedLoss
    rewriter: Rewriter


class WayPlanner:
    """Plans ways to run the step on one batch; every size of microbatch is captured once.

    Args:
        request: what `fit` was asked for.
        costs: of the step beside its graph.
        linked: the device with its link, if buffers may be transferred.
        batch: the whole one.
        updates_in_backward: whether parameters are updated as soon as their gradients are complete.
    """

    def __init__(
        self,
        request: Request,
        costs: StepCosts,
        linked: Device | None,
        batch: Any,
        updates_in_backward: bool,
    ) -> None:
        self.request, self.costs, self.linked, self.batch = request, costs, linked, batch
        self._updates_in_backward = updates_in_backward
        self._captured: dict[int | None, Captured] = {}

    def forget(self) -> None:
        """Let go of the example batch; what was captured can still run."""
        for captured in self._captured.values():
            captured.loss.arguments.clear()
        self._captured.clear()

    def consumption(self, num_microbatches: int) -> Consumption:
        """Return what happens to gradients."""
        if num_microbatches > 1:
            return Consumption.ACCUMULATE
        return Consumption.UPDATE if self._updates_in_backward else Consumption.TOGETHER

    def captured(self, num_microbatches: int) -> Captured:
        """Return the step on the first microbatch of so many, captured."""
        batch = self.batch
        piece = batch if num_microbatches == 1 else split(batch, num_microbatches)[0]
        return self._capture(piece, num_microbatches)

    def resident_bytes(self, num_microbatches: int, streaming: Streaming) -> int:
        """Return what is in memory throughout the step."""
        loss = self.captured(num_microbatches).loss
        return self.costs.memory(self.batch, loss, num_microbatches, streaming).resident_bytes

    def streamable(self, num_microbatches: int) -> Streaming:
        """Return all that could lie on the disk: what is updated together, cannot."""
        if self.linked is None:
            return Streaming()
        loss = self.captured(num_microbatches).loss
        return self._streamable(loss, num_microbatches)

    def _streamable(self, loss: CapturedLoss, num_microbatches: int) -> Streaming:
        how = self.consumption(num_microbatches)
        is_one_by_one = how is Consumption.UPDATE or (
            how is Consumption.ACCUMULATE and self.costs.steps_alone
        )
        states = self.costs.state_slots() if is_one_by_one else {}
        parameters = self.costs.parameter_slots(loss, how)
        return Streaming(states if any(states.values()) else {}, parameters)

    def way(
        self,
        choice: Choice,
        loss_weight: LossWeight | None,
        profiler: CallProfiler,
        *,
        rehearses: bool = False,
        hopeless_above: float | None = None,
    ) -> Way:
        """Return a way with its plans.

        Args:
            choice: which.
            loss_weight: of microbatches.
            profiler: observes calls.
            rehearses: measure calls inside the step that were never seen there; else their times
                are estimated, as long as any others are known.
            hopeless_above: so many bytes for a single operation make a way hopeless; by default,
                more than the budget.

        Raises:
            InfeasibleBudgetError: in terms of the whole step.
            HopelessError: the way is hopeless.
        """
        if hopeless_above is None:
            budget_bytes = self.request.budget_bytes
            hopeless_above = math.inf if budget_bytes is None else budget_bytes
        num_microbatches, streaming = choice.num_microbatches, choice.streaming
        batch = self.batch
        pieces = split(batch, num_microbatches) if num_microbatches > 1 else [batch]
        sizes = [num_rows(p) if num_microbatches > 1 else None for p in pieces]
        parts: list[Part] = []
        errors: list[InfeasibleBudgetError] = []
        layers: dict[str, int] = {}
        memory: StepMemory | None = None
        for size in dict.fromkeys(sizes):
            captured = self._capture(pieces[sizes.index(size)], num_microbatches)
            loss = captured.loss
            memory = memory or self.costs.memory(batch, loss, num_microbatches, streaming)
            step = self._completed(captured, choice, profiler)
            least_bytes = memory.peak_bytes(least_peak_bytes(step.joint.graph))
            if least_bytes > hopeless_above:
                raise HopelessError
            try:
                step, plan = self._planned(step, loss, memory, profiler, rehearses)
            except InfeasibleBudgetError as error:
                errors.append(error)  # the other size may need more
                continue
            plan = replace(plan, num_microbatches=num_microbatches)
            layers = layers or captured.rewriter.layers(choice.rewriting)
            trained = self.costs.parameters(loss.arguments)
            streamed = streamed_primals(loss, streaming)
            parts.append(Part(size, captured.capture, loss, step, plan, trained, streamed))
        if errors:
            raise max(errors, key=lambda error: error.smallest_bytes)
        assert memory is not None
        finish_seconds = 0.0
        if num_microbatches > 1 and self.costs.steps_alone:
            finish_seconds = sum(
                self.costs.update(p, None, profiler).seconds + self._moved_seconds(p, streaming)
                for p in parts[0].parameter_of.values()
            )
        return Way(
            parts=tuple(parts),
            counts=tuple(sizes.count(part.num_rows) for part in parts),
            memory=memory,
            consumption=self.consumption(num_microbatches),
            finish_seconds=finish_seconds,
            rewriting=choice.rewriting,
            layers_in_chunks=layers,
            loss_weight=loss_weight if num_microbatches > 1 else None,
            streaming=streaming,
            device=self.linked,
            num_parameters=len(list(self.request.model.parameters())),
        )

    def _moved_seconds(self, parameter: nn.Parameter, streaming: Streaming) -> float:
        """Return how long an update after the last schedule waits for its parameter and state."""
        if not streaming:
            return 0.0
        assert self.linked is not None
        link = self.linked.links[0]
        sizes = [spec.num_bytes for spec in streaming.of_update(parameter)]
        return sum(link.read_seconds(size) + link.write_seconds(size) for size in sizes)

    def _capture(self, piece: Any, num_microbatches: int) -> Captured:
        size = None if num_microbatches == 1 else num_rows(piece)
        if size not in self._captured:
            def captured(loss_fn: LossFunction) -> tuple[StepCapture, CapturedLoss]:
                capture = StepCapture(loss_fn, self.request.model)
                return capture, capture.capture(piece)

            capture, loss = blaming_precision("the loss", self.request.loss_fn, captured)
            left_bytes = self._left_bytes(loss, num_microbatches)
            rewriter = Rewriter(loss, left_bytes, self.request.moves)
            self._captured[size] = Captured(piece, capture, loss, rewriter)
        return self._captured[size]

    def _left_bytes(self, loss: CapturedLoss, num_microbatches: int) -> int | None:
        """Return what a schedule may allocate, with all on the disk that has to be there."""
        budget_bytes = self.request.budget_bytes
        if budget_bytes is None:
            return None
        memory = self.costs.memory(self.batch, loss, num_microbatches)
        left_bytes = budget_bytes - memory.resident_bytes
        if left_bytes <= budget_bytes // CHUNK_SHARE and self.linked is not None:
            streaming = self._streamable(loss, num_microbatches)
            memory = self.costs.memory(self.batch, loss, num_microbatches, streaming)
            left_bytes = budget_bytes - memory.resident_bytes
        return left_bytes

    def _completed(
        self, captured: Captured, choice: Choice, profiler: CallProfiler
    ) -> WholeStep:
        """Return a captured size as a whole step."""
        loss = captured.loss
        module = captured.rewriter.module(choice.rewriting)
        measure = naming_missing_kernels(profiler.measure, self.request.precision)
        joint = read_joint_graph(module, loss.num_forward_outputs, measure)
        how = self.consumption(choice.num_microbatches)
        return self.costs.completed(joint, loss, how, choice.streaming, profiler)

    def _planned(
        self,
        step: WholeStep,
        loss: CapturedLoss,
        memory: StepMemory,
        profiler: CallProfiler,
        rehearses: bool,
    ) -> tuple[WholeStep, Plan]:
        """Return a step with the best times that can be had, and its plan."""
        request = self.request
        if not all(f is None or f.in_step_seconds is not None for f in step.joint.facts):
            if rehearses or not profiler.has_seen_steps:
                step = self._rehearsed(step, memory, loss, profiler)
            else:
                step = replace(step, joint=with_estimated_seconds(step.joint, profiler))
        plan = plan_whole_step(step.joint.graph, memory, request.budget_bytes, self.linked)
        return step, replace(plan, allowed=tuple(sorted(request.allow)))

    def _rehearsed(
        self, step: WholeStep, memory: StepMemory, loss: CapturedLoss, profiler: CallProfiler
    ) -> WholeStep:
        """Return a step with times measured inside it."""
        joint = step.joint
        graph = replace(joint.graph, stored=())
        try:
            plan = plan_whole_step(graph, memory, self.request.budget_bytes)
        except InfeasibleBudgetError:
            if self.linked is None:
                raise
            return step  # only with transfers, which are not rehearsed
        device = self.costs.device
        if not fits(plan.peak_bytes, device):
            return step
        tangents = [n.meta["val"] for n in joint.tangents]
        program = emit(step, plan.schedule)
        seconds = rehearse(program, loss.arguments, tangents, device)
        typical = typical_seconds(joint, seconds)
        for index, value in typical.items():
            profiler.note_in_step(*joint.call(index), value)
        return replace(step, joint=joint.with_seconds(typical))
