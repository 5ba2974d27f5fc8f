"""`fit`, `profile` and `plan`: a model, a loss and an optimizer as one planned training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from packlight.capture.cache import device_name
from packlight.capture.peak import measure_peak
from packlight.errors import (
    InfeasibleBudgetError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from packlight.planner import smallest_plan
from packlight.runtime.accounting import (
    batch_bytes,
    measure_optimizer,
    plain_containers,
    tensors_bytes,
)
from packlight.runtime.backend import Compilation, PacklightBackend, StepCaptured, check_allowed
from packlight.runtime.dynamo import plain_errors, prepare_dynamo
from packlight.step import BufferKind, Phase, Plan, StepGraph, StepMemory, StepProfile, simulate
from packlight.units import format_bytes, parse_bytes

LossFunction = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One training step that was measured while it ran.

    Attributes:
        loss: the detached loss.
        peak_bytes: the whole step's peak: what was in memory before it and what it added.
    """

    loss: torch.Tensor
    peak_bytes: int


class TrainStep:
    """One training step (forward, backward, optimizer step) that keeps to a budget.

    Made by `fit`. Calling it with a batch trains one step and returns the detached loss. A batch of
    another shape is captured and planned anew, for the same budget.

    Attributes:
        budget_bytes: whole-step budget or None.
        plan: the schedule that the latest captured shape runs.
        profile: the captured step and its memory outside of the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer | None,
        budget_bytes: int | None,
        *,
        allow: Any = (),
        progress: bool = True,
    ) -> None:
        _check_parameters(model, optimizer)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.budget_bytes = budget_bytes
        self._num_steps = 0
        self._backend = PacklightBackend(
            allow=check_allowed(allow), progress=progress, choose_budget=self._schedule_budget
        )
        self._memory = _outside_memory(model, optimizer)
        # One compiled function and one plan per batch signature: dynamo would give up after a few.
        self._compiled: dict[Any, Callable[..., torch.Tensor]] = {}
        self._compilations: dict[Any, Compilation] = {}
        self._signature: Any = None

    # -- training

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train one step on a batch and return the detached scalar loss.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and optimizer are untouched.
            InfeasibleBudgetError: the batch has a new shape that does not fit in the budget.
        """
        assert self.optimizer is not None, "a TrainStep made for planning has no optimizer"
        self._select(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._compiled[self._signature](self.loss_fn, self.model, batch)
        value = loss.detach()
        if not bool(torch.isfinite(value)):
            raise NonFiniteLossError(self._num_steps, float(value))
        loss.backward()
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._num_steps += 1
        return value

    def measured(self, batch: Any) -> MeasuredStep:
        """Train one step like a call, and measure the whole step's peak (6 to 8% slower on CPU)."""
        assert self.optimizer is not None
        before = self._memory.parameter_bytes + self._memory.state_bytes + batch_bytes(batch)
        before += tensors_bytes(
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        peak = measure_peak(lambda: self(batch), self._device)
        return MeasuredStep(peak.result, before + peak.peak_bytes)

    def evaluate(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch in eval mode, without gradients; the mode is restored."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.loss_fn(self.model, batch).detach()
        finally:
            self.model.train(was_training)

    # -- planning

    def capture(self, batch: Any) -> Compilation:
        """Capture and plan the step for a batch's shapes without running any of it."""
        self._select(batch)
        return self.compilation

    def _select(self, batch: Any) -> None:
        """Make a batch's signature the current one; capture and plan it if it is new."""
        signature = (_signature(batch), self.model.training)
        if signature in self._compilations:
            self._signature = signature
            return
        self._memory = replace(self._memory, input_bytes=batch_bytes(batch))
        prepare_dynamo()
        # Dynamo's cache hangs on the code object: each signature gets one of its own.
        function = FunctionType(_traced_loss.__code__.replace(), globals())
        compiled = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=False)
        num_before = len(self._backend.compilations)
        self._backend.is_dry_run = True
        try:
            with plain_errors():
                compiled(self.loss_fn, self.model, batch)
        except StepCaptured:
            pass
        except InfeasibleBudgetError as error:
            raise self._whole_step_error(error) from None
        finally:
            self._backend.is_dry_run = False
        if len(self._backend.compilations) == num_before:
            raise UnsupportedModelError(
                "the loss does not depend on any parameter that needs a gradient"
            )
        compilation = self._backend.compilations[-1]
        _check_loss(compilation)
        self._compiled[signature] = compiled
        self._compilations[signature] = compilation
        self._signature = signature

    @property
    def compilation(self) -> Compilation:
        """The captured graph and the plan of the latest batch's shape."""
        return self._compilations[self._signature]

    @property
    def plan(self) -> Plan:
        """The schedule that runs for the latest captured shape."""
        return self.compilation.plan

    @property
    def profile(self) -> StepProfile:
        """The captured step and its memory outside of the schedule."""
        graph = self.compilation.graph
        memory = replace(self._memory, gradient_bytes=gradient_bytes(graph))
        return StepProfile(graph, memory, device_name(self._device), torch.__version__)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step, everything resident included."""
        timeline = simulate(self.compilation.graph, self.plan.schedule)
        update = timeline.live_bytes[-1] + self._memory.update_workspace_bytes
        return self._memory.resident_bytes + max(self.plan.peak_bytes, update)

    def describe(self) -> str:
        """Return a few lines: what is in memory at the peak, the plan and its price."""
        memory, plan = self.profile.memory, self.plan
        lines = [
            f"parameters      {format_bytes(memory.parameter_bytes + memory.state_bytes):>12}",
            f"optimizer state {format_bytes(memory.optimizer_bytes):>12}",
            f"batch           {format_bytes(memory.input_bytes):>12}",
            f"schedule's peak {format_bytes(plan.peak_bytes):>12}  (plain step: "
            f"{format_bytes(plan.plain_peak_bytes)}; "
            f"gradients {format_bytes(memory.gradient_bytes)})",
            f"whole step      {format_bytes(self.peak_bytes):>12}  of "
            + ("no limit" if self.budget_bytes is None else format_bytes(self.budget_bytes)),
            f"predicted time  {plan.slowdown:>11.3f}x  (no schedule below "
            f"{plan.bound_seconds / plan.plain_seconds:.3f}x; {plan.status})",
        ]
        return "\n".join(lines)

    # -- budgets

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _schedule_budget(self, graph: StepGraph) -> int | None:
        """Return what is left of the whole step's budget for the schedule of a captured graph."""
        if self.budget_bytes is None:
            return None
        memory = replace(self._memory, gradient_bytes=gradient_bytes(graph))
        left = self.budget_bytes - memory.resident_bytes
        if self.budget_bytes < memory.update_peak_bytes or left <= 0:
            smallest = smallest_plan(graph)
            needed = max(memory.resident_bytes + smallest.peak_bytes, memory.update_peak_bytes)
            raise InfeasibleBudgetError(
                self.budget_bytes,
                needed,
                "the optimizer's update",
                sorted(
                    [
                        ("parameters", memory.parameter_bytes + memory.state_bytes),
                        ("optimizer state", memory.optimizer_bytes),
                        ("gradients", memory.gradient_bytes),
                        ("batch", memory.input_bytes),
                        ("workspace", memory.update_workspace_bytes),
                    ],
                    key=lambda item: -item[1],
                ),
                "an optimizer with less state (SGD has none without momentum) lowers it",
            )
        return left

    def _whole_step_error(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        """Return a schedule's error in terms of the whole step's budget."""
        if self.budget_bytes is None or error.budget_bytes == self.budget_bytes:
            return error
        resident = self._memory.resident_bytes
        return InfeasibleBudgetError(
            self.budget_bytes,
            resident + error.smallest_bytes,
            error.peak_operation,
            [("parameters, optimizer state and batch", resident), *error.peak_buffers],
            error.hint,
        )


def _traced_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_fn(model, batch)


def _signature(batch: Any) -> tuple[Any, ...]:
    """Return what a plan depends on: the batch's structure, shapes, dtypes and plain values."""
    leaves, spec = pytree.tree_flatten(plain_containers(batch))
    described = tuple(
        (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else repr(x)
        for x in leaves
    )
    return str(spec), described


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    budget: str | int | None = None,
    *,
    allow: Any = (),
    progress: bool = True,
) -> TrainStep:
    """Return a training step that keeps everything it holds within a budget.

    Args:
        model: in the mode (train or eval) that it will be trained in.
        loss_fn: `loss_fn(model, batch)` returns a scalar tensor.
        optimizer: over parameters of the model.
        batch: an example; only its shapes and dtypes matter, nothing is trained yet.
        budget: bytes, or a string such as "1GiB": parameters, model buffers, batch, gradients,
            optimizer state, activations and workspace together. None for no limit.
        allow: names of approximate techniques.
        progress: show what profiling does.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.
        GraphBreakError, UnsupportedModelError, OptionError, BudgetFormatError.

    >>> import torch, packlight
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss_fn = lambda model, batch: model(batch).square().mean()
    >>> step = packlight.fit(model, loss_fn, optimizer, torch.ones(8, 4), budget="1MiB")
    >>> losses = [float(step(torch.ones(8, 4))) for _ in range(3)]
    >>> losses[2] < losses[0]
    True
    """
    budget_bytes = None if budget is None else parse_bytes(budget)
    step = TrainStep(model, loss_fn, optimizer, budget_bytes, allow=allow, progress=progress)
    step.capture(batch)
    return step


def profile(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    progress: bool = True,
) -> StepProfile:
    """Return one training step as data, with what it holds outside of its schedule; trains nothing.

    Args and errors: as `fit`; without an optimizer its state counts as nothing.
    """
    step = TrainStep(model, loss_fn, optimizer, None, progress=progress)
    step.capture(batch)
    return step.profile


def plan(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    budget: str | int | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    allow: Any = (),
    progress: bool = True,
) -> Plan:
    """Return the plan that `fit` would run; trains nothing. Args and errors: as `fit`."""
    budget_bytes = None if budget is None else parse_bytes(budget)
    step = TrainStep(model, loss_fn, optimizer, budget_bytes, allow=allow, progress=progress)
    return step.capture(batch).plan


def gradient_bytes(graph: StepGraph) -> int:
    """Return the size of the parameters' gradients that a step leaves behind."""
    from packlight.capture.joint import TANGENT

    tangents = {b for o in graph.operations if o.name == TANGENT for b in o.creates}
    made = {b for o in graph.operations if o.phase is Phase.BACKWARD for b in o.creates}
    return sum(graph.buffers[b].bytes for b in graph.outputs if b in made and b not in tangents)


def _outside_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> StepMemory:
    measured = measure_optimizer(optimizer) if optimizer is not None else None
    return StepMemory(
        parameter_bytes=tensors_bytes(model.parameters()),
        state_bytes=tensors_bytes(model.buffers()),
        input_bytes=0,
        optimizer_bytes=measured.state_bytes if measured else 0,
        update_workspace_bytes=measured.workspace_bytes if measured else 0,
        gradient_bytes=0,
    )


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UnsupportedModelError("no parameter of the model needs a gradient: nothing to train")
    if optimizer is None:
        return
    mine = {id(p) for p in model.parameters()}
    strange = [
        tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in mine
    ]
    if strange:
        raise UnsupportedModelError(
            f"the optimizer holds {len(strange)} parameters that are not the model's, the first of "
            f"shape {strange[0]}\nhint: build the optimizer from model.parameters()"
        )


def _check_loss(compilation: Compilation) -> None:
    shapes = compilation.output_shapes
    outputs = [
        b
        for b in compilation.graph.forward_outputs
        if compilation.graph.buffers[b].kind is BufferKind.OUTPUT
    ]
    if len(shapes) != 1 or shapes[0] != ():
        raise UnsupportedModelError(
            f"loss_fn must return one scalar tensor, it returned {len(shapes)} tensor"
            f"{'' if len(shapes) == 1 else 's'} of shape {', '.join(map(str, shapes))} "
            f"({len(outputs)} outputs in all)\nhint: take the mean or the sum"
        )
