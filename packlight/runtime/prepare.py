"""From a batch's shapes and a budget to a step that can run: which moves, which schedule.

Every way to run the step (how many microbatches, the loss head in how many chunks, updates in the
backward or after it) is captured, completed to a `WholeStep` and planned by the one planner; the
fastest way that fits is taken. Ways that change how sums are rounded (microbatches, chunks) must be
faster by a margin than ways that keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from packlight.capture.joint import JointStep, read_joint_graph
from packlight.capture.profiler import CallProfiler
from packlight.capture.whole_step import Consumer, Consumption, WholeStep, whole_step
from packlight.errors import InfeasibleBudgetError
from packlight.planner import plan_whole_step
from packlight.runtime.accounting import batch_bytes, measure_optimizer, tensors_bytes
from packlight.runtime.gradients import Clipping
from packlight.runtime.program import emit_program
from packlight.runtime.rehearse import fits, rehearse_program, typical_seconds
from packlight.runtime.step_capture import CapturedLoss, LossFunction, StepCapture
from packlight.runtime.update import ParameterUpdates
from packlight.step import Plan, StepGraph, StepMemory

MOVES = ("update-in-backward", "microbatch", "chunk", "offload")
# How much faster a step that rounds its sums in another order must be.
ROUNDING_MARGIN = 1.02
TANGENT_BYTES = 4


@dataclass(frozen=True)
class Request:
    """What `fit` was asked for.

    Attributes:
        model, loss_fn, optimizer: the user's; no optimizer where nothing is to be trained.
        budget_bytes: for the whole step, None for no limit.
        moves: names out of `MOVES` that may be used.
        allow: names of approximate techniques.
        clipping: of gradients.
        scaler: scales the loss.
        loss_weight: the user's weight of a microbatch.
        progress: show what profiling does.
    """

    model: nn.Module
    loss_fn: LossFunction
    optimizer: torch.optim.Optimizer | None
    budget_bytes: int | None
    moves: frozenset[str]
    allow: frozenset[str]
    clipping: Clipping
    scaler: torch.amp.GradScaler | None
    loss_weight: Any
    progress: bool


@dataclass(frozen=True)
class Part:
    """One captured size of microbatch, and how it runs.

    Attributes:
        capture: runs the installed program.
        captured: the joint graph and the real inputs that it was captured with.
        step: the whole step behind it.
        plan: its schedule.
        parameter_of: primal -> trained parameter.
    """

    capture: StepCapture
    captured: CapturedLoss
    step: WholeStep
    plan: Plan
    parameter_of: dict[int, nn.Parameter]


@dataclass(frozen=True)
class Way:
    """One way to run the step.

    Attributes:
        parts: one, or two where the last microbatches are smaller.
        counts: how many microbatches run as each part.
        memory: bytes outside of the schedule.
        consumption: what happens to gradients.
        finish_seconds: of the update after the last schedule.
        num_chunks: of the loss head, 1 where it runs whole.
    """

    parts: tuple[Part, ...]
    counts: tuple[int, ...]
    memory: StepMemory
    consumption: Consumption
    finish_seconds: float = 0.0
    num_chunks: int = 1

    @property
    def num_microbatches(self) -> int:
        """How often a schedule runs for one update."""
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        """Predicted duration of the whole step."""
        runs = zip(self.parts, self.counts, strict=True)
        return sum(part.plan.seconds * count for part, count in runs) + self.finish_seconds

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step."""
        return self.memory.peak_bytes(max(part.plan.peak_bytes for part in self.parts))

    @property
    def is_bit_exact(self) -> bool:
        """Whether sums are rounded in the plain step's order."""
        return self.num_microbatches == 1 and self.num_chunks == 1


class Preparer:
    """Finds the fastest way to run a step within the budget, for one batch signature at a time."""

    def __init__(self, request: Request) -> None:
        self.request = request
        model, optimizer = request.model, request.optimizer
        self.device = next(model.parameters()).device
        self.updates: ParameterUpdates | None = None
        self.optimizer_bytes = self.update_workspace_bytes = 0
        if optimizer is not None:
            measured = measure_optimizer(optimizer)
            self.optimizer_bytes = measured.state_bytes
            self.update_workspace_bytes = measured.workspace_bytes
            self.updates = ParameterUpdates(optimizer)
        self.name_of = {id(p): name for name, p in model.named_parameters()}
        self.trained = {
            id(p): p
            for group in (optimizer.param_groups if optimizer else [{"params": model.parameters()}])
            for p in group["params"]
            if p.requires_grad
        }

    # -- why a move is not made

    @property
    def no_update_in_backward(self) -> str | None:
        """Why parameters are not updated in the backward, None if they may be."""
        request = self.request
        if "update-in-backward" not in request.moves:
            return "not among the moves"
        if self.updates is None:
            return "there is no optimizer"
        if request.clipping.norm is not None:
            return (
                "clipping by the norm of all gradients needs all of them first (clip_grad_value "
                "does not)"
            )
        if request.scaler is not None:
            return "the loss scaler looks at all gradients before it lets the optimizer step"
        return self.updates.refusal

    # -- ways

    def prepare(self, batch: Any) -> Way:
        """Return the fastest way found to train on a batch like this within the budget.

        Raises:
            InfeasibleBudgetError: with the smallest whole-step budget of all ways looked at.
        """
        self._parts: dict[Any, tuple[StepCapture, CapturedLoss]] = {}
        found: list[Way] = []
        errors: list[InfeasibleBudgetError] = []
        with CallProfiler(self.request.progress) as profiler:
            for num_microbatches in self._counts(batch):
                try:
                    way = self._way(batch, num_microbatches, profiler)
                except InfeasibleBudgetError as error:
                    errors.append(error)
                    continue
                found.append(way)
                if self._is_not_worth_going_on(way, found):
                    break
        self._parts.clear()
        if not found:
            raise min(errors, key=lambda error: error.smallest_bytes)
        return min(found, key=_handicapped_seconds)

    def _is_not_worth_going_on(self, way: Way, found: Sequence[Way]) -> bool:
        fastest = min(w.seconds for w in found)
        is_plain = all(p.plan.slowdown <= 1.0 + 1e-9 for p in way.parts)
        return is_plain or way.seconds > 1.1 * fastest

    def _counts(self, batch: Any) -> Iterator[int]:
        yield 1

    def _way(self, batch: Any, num_microbatches: int, profiler: CallProfiler) -> Way:
        capture, captured = self._captured(batch)
        joint = read_joint_graph(captured.joint, captured.num_forward_outputs, profiler.measure)
        reason = self.no_update_in_backward
        how = Consumption.TOGETHER if reason else Consumption.UPDATE
        step = self._completed(joint, captured, how)
        memory = self._memory(batch, joint, captured, how)
        plan = self._plan(step.joint.graph, memory)
        step, plan = self._rehearsed(step, plan, memory, captured, profiler)
        part = Part(capture, captured, step, plan, self.parameters(captured.arguments))
        captured.arguments.clear()  # they would keep the example batch in memory
        return Way((part,), (1,), memory, how)

    def _captured(self, batch: Any) -> tuple[StepCapture, CapturedLoss]:
        capture = StepCapture(self.request.loss_fn, self.request.model)
        return capture, capture.capture(batch)

    def _completed(
        self, joint: JointStep, captured: CapturedLoss, how: Consumption
    ) -> WholeStep:
        consumers: dict[int, Consumer] = {}
        for primal, parameter in self.parameters(captured.arguments).items():
            name = self.name_of[id(parameter)]
            consumers[primal] = Consumer(name)
            node = joint.backward_results[primal]
            if self.updates is None or self.updates.refusal is not None or node is None:
                continue
            cost = self.updates.cost(parameter, tuple(node.meta["val"].stride()))
            if how is Consumption.ACCUMULATE:
                continue
            workspace = cost.workspace_bytes
            if self.request.clipping.value is not None:
                workspace += parameter.nbytes
            consumers[primal] = Consumer(name, cost.seconds, workspace, cost.state_bytes)
        together = None
        if how is Consumption.TOGETHER:
            seconds = sum(consumer.seconds for consumer in consumers.values())
            clipping_bytes = 16 * len(consumers) + 64 if self.request.clipping.norm else 0
            workspace = max(self.update_workspace_bytes, clipping_bytes)
            together = Consumer("all parameters", seconds, workspace)
        return whole_step(joint, consumers, how, together)

    def parameters(self, arguments: Sequence[Any]) -> dict[int, nn.Parameter]:
        """Return the trained parameters among a captured call's inputs, by position."""
        return {i: self.trained[id(a)] for i, a in enumerate(arguments) if id(a) in self.trained}

    # -- memory and plans

    def _memory(
        self, batch: Any, joint: JointStep, captured: CapturedLoss, how: Consumption
    ) -> StepMemory:
        gradients = tensors_of_gradients(joint, self.parameters(captured.arguments))
        model = self.request.model
        memory = StepMemory(
            parameter_bytes=tensors_bytes(model.parameters()),
            state_bytes=tensors_bytes(model.buffers()),
            input_bytes=batch_bytes(batch) + TANGENT_BYTES,
            optimizer_bytes=self.optimizer_bytes,
            update_workspace_bytes=0,
            gradient_bytes=gradients,
        )
        return memory

    def _plan(self, graph: StepGraph, memory: StepMemory) -> Plan:
        return plan_whole_step(graph, memory, self.request.budget_bytes)

    def _rehearsed(
        self,
        step: WholeStep,
        plan: Plan,
        memory: StepMemory,
        captured: CapturedLoss,
        profiler: CallProfiler,
    ) -> tuple[WholeStep, Plan]:
        """Return step and plan with times measured inside the step."""
        joint = step.joint
        is_known = all(f is None or f.in_step_seconds is not None for f in joint.facts)
        if is_known or not fits(plan.peak_bytes, self.device):
            return step, plan
        tangents = [n.meta["val"] for n in joint.tangents]
        program = emit_program(step, plan.schedule)
        seconds = typical_seconds(
            joint, rehearse_program(program, captured.arguments, tangents, self.device)
        )
        for index, typical in seconds.items():
            profiler.note_in_step(*joint.call(index), typical)
        step = replace(step, joint=joint.with_seconds(seconds))
        return step, self._plan(step.joint.graph, memory)


def tensors_of_gradients(joint: JointStep, trained: dict[int, nn.Parameter]) -> int:
    """Return the bytes of the gradients of trained parameters, shared storages counted once."""
    nodes = [joint.backward_results[primal] for primal in trained]
    buffers = {joint.buffer_of_node[n] for n in nodes if n in joint.buffer_of_node}
    return sum(joint.graph.buffers[b].bytes for b in buffers)


def _handicapped_seconds(way: Way) -> float:
    return way.seconds * (1.0 if way.is_bit_exact else ROUNDING_MARGIN)
