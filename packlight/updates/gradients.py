"""What becomes of gradients: updates in the backward, accumulation, or one update for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from packlight.errors import NonFiniteLossError, UnsupportedModelError
from packlight.ranks.reducer import Reducer
from packlight.ranks.sharded import ShardedParameters
from packlight.ranks.together import Together
from packlight.torch_internals.autograd import after_accumulation, has_gradient_hooks, through_hooks
from packlight.torch_internals.optimizers import overflows
from packlight.updates.several import SeveralUpdates, parts_of
from packlight.updates.slices import like_eager
from packlight.updates.update import ParameterUpdates


@dataclass(frozen=True, slots=True)
class Clipping:
    """How gradients are clipped before the update, if at all.

    Attributes:
        norm: of all gradients together (`torch.nn.utils.clip_grad_norm_`).
        value: of each element.
    """

    norm: float | None = None
    value: float | None = None


@dataclass
class GradientFate:
    """Receives results and gradients from a running step program (see `program.StepEvents`).

    Attributes:
        parameter_of: primal -> parameter whose gradient is consumed.
        loss_index: the forward result that is the loss.
        clipping: of gradients.
        updates: where given, a parameter is updated as soon as its gradient is complete; else
            gradients are collected in `parameter.grad`.
        num_steps: trained so far, for errors.
        microbatch_index: the one that runs, None where the batch runs as a whole.
        reducer: tells the other ranks, where there are some, and looks at all losses.
        sharded: has the parameters that lie in pieces with all ranks.
        place_of: where a parameter's gradient is accumulated; None for wherever it is.
        accumulates: gradients of all ranks are added to those of earlier microbatches.
    """

    parameter_of: Mapping[int, nn.Parameter]
    loss_index: int
    clipping: Clipping
    updates: ParameterUpdates | SeveralUpdates | None = None
    num_steps: int = 0
    microbatch_index: int | None = None
    reducer: Reducer | None = None
    sharded: ShardedParameters | None = None
    place_of: Callable[[nn.Parameter], torch.Tensor] | None = None
    accumulates: bool = False

    def result(self, index: int, value: torch.Tensor) -> None:
        """Refuse a loss that is not finite, before anything is updated."""
        if self.reducer is not None:
            if index == self.loss_index and self.microbatch_index is None:
                self.reducer.give_loss(float(value))
            return
        if index == self.loss_index and not bool(torch.isfinite(value)):
            raise NonFiniteLossError(self.num_steps, float(value), self.microbatch_index)

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        """Update the parameter, or collect its gradient, and call the parameter's hooks."""
        parameter = self.parameter_of[primal]
        if self.reducer is not None and not self.reducer.counts:
            return
        if has_gradient_hooks(parameter):
            self._hooked(parameter, gradient)
            return
        if self.updates is None and parameter.grad is not None:
            parameter.grad.add_(gradient)
            return
        if self.place_of is not None:
            parameter.grad = self.place_of(parameter).copy_(gradient)
            return
        # Clipping and the optimizer may overwrite it, as eager's, which nobody else looks at.
        self._consume(parameter, gradient, is_last_use and fills_storage(gradient))

    def gradients(self, complete: Sequence[tuple[int, torch.Tensor, bool]]) -> None:
        """Update several parameters with one step of the optimizer."""
        assert self.updates is not None, "what is collected is updated later"
        given: list[tuple[nn.Parameter, torch.Tensor]] = []
        for primal, gradient, is_last_use in complete:
            parameter = self.parameter_of[primal]
            if has_gradient_hooks(parameter):  # since the step was planned
                self._hooked(parameter, gradient)
            else:
                is_own = is_last_use and fills_storage(gradient)
                given.append((parameter, self._clipped(gradient if is_own else gradient.clone())))
        self.updates.apply_together(given)

    def reduced_gradient(self, primal: int, gradient: torch.Tensor) -> None:
        """Do the same with the gradient of all ranks, which nobody else looks at."""
        parameter = self.parameter_of[primal]
        if self.sharded is not None and parameter in self.sharded:
            with self.sharded.own(parameter):
                if gradient.numel():  # else all of it is another rank's
                    self._consume(parameter, gradient, is_own=True)
        elif has_gradient_hooks(parameter):
            self._hooked(parameter, gradient)
        else:
            self._consume(parameter, gradient, is_own=True)

    def share(self, primal: int) -> None:
        """Start giving all ranks the rows of a parameter that each of them has updated."""
        assert self.sharded is not None, "what is shared is in pieces"
        self.sharded.share(self.parameter_of[primal])

    def _consume(
        self, parameter: nn.Parameter, gradient: torch.Tensor, is_own: bool
    ) -> None:
        if self.accumulates:
            if parameter.grad is None:
                parameter.grad = like_eager(gradient, parameter).clone()
            else:
                parameter.grad.add_(gradient)
            return
        if self.updates is None:
            in_layout = like_eager(gradient, parameter)
            is_copied = in_layout is not gradient
            parameter.grad = in_layout if is_own or is_copied else gradient.clone()
            return
        self.updates.apply(parameter, self._clipped(gradient if is_own else gradient.clone()))

    def _hooked(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Do what autograd does with the whole gradient of a parameter that has hooks."""
        gradient = through_hooks(parameter, like_eager(gradient, parameter).clone())
        accumulated = parameter.grad
        parameter.grad = gradient if accumulated is None else accumulated.add_(gradient)
        after_accumulation(parameter)
        if self.updates is None:
            return
        gradient_left, parameter.grad = parameter.grad, None
        if gradient_left is None:  # a hook has made something of it
            return
        self.updates.apply(parameter, self._clipped(gradient_left))

    def _clipped(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a gradient that nobody else looks at with each of its elements clipped."""
        if self.clipping.value is not None:
            gradient.clamp_(-self.clipping.value, self.clipping.value)
        return gradient


def fills_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage holds nothing else, and each of its elements once."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def update_all(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    clipping: Clipping,
    scaler: torch.amp.GradScaler | None,
    updates: ParameterUpdates | SeveralUpdates | None,
    in_memory: Callable[[nn.Parameter], AbstractContextManager[None]] = lambda _: nullcontext(),
    together: Together | None = None,
) -> None:
    """Update all parameters from their collected gradients.

    Args:
        optimizer: the user's.
        parameters: those that may have a gradient, in the order in which their norms are added.
        clipping: applied first.
        scaler: unscales first, and skips the update where a gradient is not finite.
        updates: where given, parameters are updated one after the other, with less workspace;
            its step has begun.
        in_memory: with `updates`, the context in which a parameter and its state are there.
        together: looks at the gradients of all ranks, where each has parts of them.
    """
    gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    has_overflow = False
    for part in parts_of(optimizer) if scaler is not None else ():
        assert scaler is not None
        scaler.unscale_(part)
        if together is not None:
            has_overflow |= _agreed_overflow(scaler, part, together)
    if clipping.value is not None:
        for _, gradient in gradients:
            gradient.clamp_(-clipping.value, clipping.value)
    if clipping.norm is not None:
        _clip_norm(gradients, clipping.norm, together)
    if scaler is not None and together is not None and updates is not None:
        if not has_overflow:
            _update_one_by_one(gradients, updates, in_memory)
        scaler.update()
    elif scaler is not None:
        for part in parts_of(optimizer):
            scaler.step(part)
        scaler.update()
    elif updates is not None:
        _update_one_by_one(gradients, updates, in_memory)
    else:
        optimizer.step()


def _update_one_by_one(
    gradients: list[tuple[nn.Parameter, torch.Tensor]],
    updates: ParameterUpdates | SeveralUpdates,
    in_memory: Callable[[nn.Parameter], AbstractContextManager[None]],
) -> None:
    while gradients:
        parameter, gradient = gradients.pop(0)
        parameter.grad = None
        with in_memory(parameter):
            updates.apply(parameter, gradient)
            del gradient


def _clip_norm(
    gradients: Sequence[tuple[nn.Parameter, torch.Tensor]],
    max_norm: float,
    together: Together | None,
) -> None:
    parameters = [p for p, _ in gradients]
    if together is None:
        nn.utils.clip_grad_norm_(parameters, max_norm, foreach=False)
        return
    norm = together.norm(gradients)
    for parameter, gradient in gradients:  # a rank may have none
        total = gradient.new_tensor(norm)
        nn.utils.clip_grads_with_norm_([parameter], max_norm, total, foreach=False)


def _agreed_overflow(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, together: Together
) -> bool:
    """Have a scaler know of gradients that are not finite on any rank; return if there are any."""
    found = overflows(scaler, optimizer)
    if not found:  # all of this optimizer's rows are other ranks'
        device = next(p for group in optimizer.param_groups for p in group["params"]).device
        found[device] = torch.zeros(1, device=device)
    is_any = together.is_on_any(any(bool(flag) for flag in found.values()))
    for flag in found.values():
        flag.fill_(float(is_any))
    return is_any


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave parameters without gradients."""
    for parameter in parameters:
        parameter.grad = None


def refuse_held_gradients(
    parameters: Iterable[nn.Parameter], name_of: Mapping[int, str]
) -> None:
    """Raise if parameters hold gradients before a step, which it would drop.

    Args:
        parameters: those that the step trains.
        name_of: their names by id.

    Raises:
        UnsupportedModelError: some do; says which.
    """
    held = [p for p in parameters if p.grad is not None]
    if held:
        raise UnsupportedModelError(
            f"{len(held)} parameters hold gradients already, the first of them "
            f"{name_of.get(id(held[0]), 'one')!r}: a step makes its own, and would drop them\n"
            "hint: optimizer.zero_grad() before it; fit(..., accumulate=True) adds gradients of "
            "several batches and losses up"
        )
