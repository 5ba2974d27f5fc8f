"""`fit`, `profile` and `plan`: a model, a loss and an optimizer as one planned training step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from packlight.backend import check_allowed
from packlight.capture.batch import batch_leaves
from packlight.capture.step_capture import CapturedAgainError, LossFunction
from packlight.costs.cache import device_name
from packlight.costs.peak import measure_peak
from packlight.errors import OptionError, UnsupportedModelError
from packlight.garbage import old_objects_kept
from packlight.moves.precision import (
    blaming_precision,
    chosen_precision,
    loss_scaler,
    under_autocast,
)
from packlight.run.step import StepRunner
from packlight.search.prepare import Preparer
from packlight.search.ways import MOVES, TECHNIQUES, Request, Way
from packlight.step import Plan, StepProfile
from packlight.units import parse_bytes
from packlight.updates.accounting import batch_bytes, tensors_bytes
from packlight.updates.gradients import Clipping
from packlight.updates.twin import forwards_to

# After so many plans it is time to tell.
MANY_PLANS = 6



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
        way: how the latest captured shape runs: moves, schedules, memory.
        scaler: of the loss, None if it is not scaled; its state belongs into a checkpoint.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.model, self.optimizer = request.model, request.optimizer
        self.budget_bytes, self.scaler = request.budget_bytes, request.scaler
        self._trained: Any = None
        self._look_at_parameters()
        # One plan per batch signature: dynamo would give up after a few.
        self._runners: dict[Any, StepRunner] = {}
        self._signature: Any = None
        self._num_steps = self._num_plans = 0

    def _look_at_parameters(self) -> bool:
        """Start over if parameters were frozen, freed or added; return whether they were."""
        groups: list[Any] = [{"params": self.model.parameters()}]
        if self.optimizer is not None:
            groups += self.optimizer.param_groups
        trained = [
            [(id(p), p.requires_grad, _has_hooks(p)) for p in group["params"]] for group in groups
        ]
        if trained == self._trained:
            return False
        _check_parameters(self.model, self.optimizer)
        # What is on the disk stays known.
        streamed = None if self._trained is None else self._preparer.streamed
        self._preparer: Preparer = Preparer(self.request, streamed)
        self._trained = trained
        return True

    # -- training

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train one step on a batch and return the detached scalar loss.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and optimizer are untouched.
            LossScaleError: gradients keep overflowing; parameters and optimizer are untouched.
            InfeasibleBudgetError: the batch has a new shape that does not fit in the budget.
        """
        assert self.optimizer is not None, "a TrainStep made for planning has no optimizer"
        self.prepare(batch)
        try:
            loss = self._runners[self._signature].run(batch, self._num_steps)
        except CapturedAgainError:  # the model changed: nothing has run yet
            del self._runners[self._signature]
            self.prepare(batch)
            loss = self._runners[self._signature].run(batch, self._num_steps)
        self._num_steps += 1
        return loss

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor (a parameter, optimizer state) lies in the offload directory's file.

        It can be read and written like any other, and takes no memory.
        """
        return self._preparer.is_on_disk(tensor)

    def measured(self, batch: Any) -> MeasuredStep:
        """Train one step like a call, and measure the whole step's peak (6 to 8% slower on CPU)."""
        assert self.optimizer is not None
        self.prepare(batch)
        runner, memory = self._runners[self._signature], self.way.memory
        runner.arrange()
        before = memory.parameter_bytes + memory.state_bytes + batch_bytes(batch)
        before += tensors_bytes(
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and not self.is_on_disk(value)
        )
        peak = measure_peak(lambda: self(batch), self._preparer.device)
        return MeasuredStep(peak.result, before + peak.peak_bytes)

    def evaluate(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch in eval mode, without gradients; modes are restored.

        It is computed in the precision of the training step, by eager PyTorch.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                # Eager PyTorch may call kernels that a traced step does not.
                return blaming_precision(
                    "the eager forward", self.request.loss_fn, lambda f: f(self.model, batch)
                ).detach()
        finally:
            for module, was_training in modes:
                module.training = was_training

    # -- planning

    def prepare(self, batch: Any) -> Way:
        """Capture and plan the step for a batch's shapes, if that is not done; train nothing."""
        if self._look_at_parameters():
            self._runners.clear()
        signature = (_signature(batch), self.model.training)
        if signature not in self._runners:
            with old_objects_kept():
                way = self._preparer.prepare(batch)
                self._note_plan()
                self._runners[signature] = StepRunner(self._preparer, way)
        self._signature = signature
        return self.way

    def _note_plan(self) -> None:
        """Warn, once, where planning does not pay because hardly a step is like one before."""
        self._num_plans += 1
        if self._num_plans == MANY_PLANS and self._num_plans > self._num_steps / 2:
            warnings.warn(
                f"{self._num_plans} of {self._num_steps + 1} steps were planned anew: shapes or "
                "plain values in the batch, or numbers that the model counts, change\nhint: pad "
                "batches to few shapes, and pass numbers that change as tensors",
                stacklevel=4,
            )

    @property
    def way(self) -> Way:
        """How the latest batch's shape runs."""
        return self._runners[self._signature].way

    @property
    def plan(self) -> Plan:
        """The schedule that runs for the latest captured shape (per microbatch, the largest)."""
        return self.way.parts[0].plan

    @property
    def profile(self) -> StepProfile:
        """The captured step and its memory outside of the schedule."""
        graph = self.way.parts[0].step.joint.graph
        return StepProfile(
            graph, self.way.memory, device_name(self._preparer.device), torch.__version__,
            self.way.device,
        )

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step, everything resident included."""
        return self.way.peak_bytes

    def describe(self) -> str:
        """Return a few lines: what is in memory at the peak, the moves made, and the price."""
        from packlight.search.words import describe_way

        return describe_way(self.way, self.request)

    def how_it_runs(self) -> list[tuple[str, str]]:
        """Return (name, text): the precision, the moves made, and why others were not."""
        from packlight.search.words import how_it_runs

        return how_it_runs(self.way, self.request)


def _signature(batch: Any) -> tuple[Any, ...]:
    """Return what a plan depends on: the batch's structure, shapes, dtypes and plain values."""
    return type(batch), *((path, _described(leaf)) for path, leaf in batch_leaves(batch))


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return (leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else repr(leaf)


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    budget: str | int | None = None,
    *,
    moves: Iterable[str] | None = None,
    allow: Any = (),
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    loss_weight: Any = None,
    offload_directory: str | os.PathLike[str] | None = None,
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
        moves: what may be done to fit beside recomputation; all of `MOVES` if None.
        allow: names of approximate techniques. "bf16" or "fp16" run the loss under
            `torch.autocast`, as a block around `loss_fn` would; parameters, gradients and updates
            keep their dtype.
        clip_grad_norm: clip the norm of all gradients together, as `clip_grad_norm_` does.
        clip_grad_value: clip every element of the gradients, as `clip_grad_value_` does.
        scaler: scales the loss as in a loop with `torch.amp.GradScaler`. With "fp16" one is made
            if None; it is the result's `scaler`.
        loss_weight: how much a microbatch counts: a function of a batch that returns a number, or
            "sum" for losses that are sums. Found in the captured loss if None.
        offload_directory: where activations, optimizer state and parameters may lie while nobody
            needs them. What lies there between steps is memory-mapped: it can be read and written
            as ever, also when the training step is let go of; its file is there as long. None
            keeps all in memory.
        progress: show what profiling does.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.
        OffloadError: the directory cannot hold what is offloaded.
        PrecisionError: an operation does not run in the precision that is allowed.
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
    step = TrainStep(
        _request(
            model, loss_fn, optimizer, budget, moves=moves, allow=allow,
            clip_grad_norm=clip_grad_norm, clip_grad_value=clip_grad_value, scaler=scaler,
            loss_weight=loss_weight, offload_directory=offload_directory, progress=progress,
        )
    )
    step.prepare(batch)
    step._runners[step._signature].arrange()
    return step


def profile(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    allow: Any = (),
    progress: bool = True,
) -> StepProfile:
    """Return the plain training step as data (all gradients, then the update); trains nothing.

    Args and errors: as `fit`; without an optimizer its state counts as nothing.
    """
    return planned_step(
        model, loss_fn, batch, None, optimizer, moves=(), allow=allow, progress=progress
    ).profile


def plan(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    budget: str | int | None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Plan:
    """Return the plan that `fit` would run; trains nothing.

    Args, options and errors: as `fit`. Where microbatches differ in size, the larger ones' plan.
    """
    return planned_step(model, loss_fn, batch, budget, optimizer, **options).plan


def planned_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    budget: str | int | None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> TrainStep:
    """Return a prepared step for looking at; without an optimizer it cannot train."""
    step = TrainStep(_request(model, loss_fn, optimizer, budget, **options))
    step.prepare(batch)
    return step


def _request(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: torch.optim.Optimizer | None,
    budget: str | int | None,
    *,
    moves: Iterable[str] | None = None,
    allow: Any = (),
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    loss_weight: Any = None,
    offload_directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Request:
    names = frozenset(MOVES if moves is None else moves)
    strange = sorted(names - set(MOVES))
    if strange:
        raise OptionError(
            f"unknown move {strange[0]!r}\nhint: known moves are {', '.join(map(repr, MOVES))}"
        )
    allowed = frozenset(check_allowed(allow, TECHNIQUES))
    precision, device = chosen_precision(allowed), next(model.parameters(), torch.empty(0)).device
    if precision is not None:
        loss_fn = under_autocast(loss_fn, precision, device)
        scaler = loss_scaler(model, precision, device, scaler)
    return Request(
        model, loss_fn, optimizer, None if budget is None else parse_bytes(budget), names,
        allowed, Clipping(clip_grad_norm, clip_grad_value), scaler, loss_weight,
        None if offload_directory is None else Path(offload_directory), progress,
    )


def _has_hooks(parameter: torch.Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UnsupportedModelError("no parameter of the model needs a gradient: nothing to train")
    hooked = [name for name, p in model.named_parameters() if p.requires_grad and _has_hooks(p)]
    if hooked:
        raise UnsupportedModelError(
            f"hooks are registered on {len(hooked)} parameters, the first of them {hooked[0]!r}: "
            "autograd would call them, and a planned step does not run through autograd\n"
            "hint: remove them; gradients are clipped by clip_grad_norm= and clip_grad_value="
        )
    if optimizer is None:
        return
    _refuse_forwarding(optimizer)
    mine = {id(p) for p in model.parameters()}
    strange = [
        tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in mine
    ]
    if strange:
        raise UnsupportedModelError(
            f"the optimizer holds {len(strange)} parameters that are not the model's, the first of "
            f"shape {strange[0]}\nhint: build the optimizer from model.parameters()"
        )


def _refuse_forwarding(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer that hands everything on decides when to step: a planned step cannot ask it."""
    inside = forwards_to(optimizer)
    if inside is None:
        return
    name = type(optimizer).__name__
    held = f"that it holds as {inside!r}" if inside else "of another object"
    hint = f"fit the optimizer inside, optimizer.{inside}" if inside else "fit that one"
    raise UnsupportedModelError(
        f"{name} has no parameters and state of its own, but those {held}\nhint: {hint}; "
        "accumulating gradients over batches is fit's own (one larger batch in microbatches), as "
        "are clipping and scaling (clip_grad_norm=, scaler=)"
    )
