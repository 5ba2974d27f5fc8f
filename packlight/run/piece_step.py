"""A training step whose loss breaks into pieces: eager autograd between them, a budget for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from packlight.capture.dynamo import BACKWARD_HINT
from packlight.capture.pieces import PiecewiseCall
from packlight.capture.returned import detached, loss_of, with_loss
from packlight.capture.step_capture import LossFunction
from packlight.errors import (
    GraphBreakError,
    InfeasibleBudgetError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from packlight.moves.in_backward import UpdateInBackward
from packlight.moves.precision import refuse_collapsed_scale
from packlight.moves.step_costs import SCALAR_BYTES, StepCosts
from packlight.run.pieces import Pieces, PlannedPath
from packlight.search.forms import KNOWN_MOVES, fused_form
from packlight.step import Plan, StepMemory
from packlight.torch_internals.inductor import compiler_problem
from packlight.units import format_bytes
from packlight.updates.accounting import batch_bytes, tensors_bytes
from packlight.updates.gradients import drop_gradients, refuse_held_gradients, update_all


class PieceStepRunner:
    """Trains steps of a loss that is no one graph, batches of one signature.

    The first step captures the pieces and the second records what Python does between them, both
    with each piece under its own smallest plan; from then on all pieces run as planned together.

    Args:
        costs: of the user's optimizer and model.
        loss_fn: the user's, perhaps under autocast.
        batch: an example.
        error: why the loss is no one graph.
    """

    def __init__(
        self, costs: StepCosts, loss_fn: LossFunction, batch: Any, error: GraphBreakError
    ) -> None:
        self._costs, self._loss_fn, self._first_break = costs, loss_fn, error
        request = self._request = costs.request
        self._trained = costs.trained_in_order
        self._in_backward = (
            UpdateInBackward.name in request.moves and costs.steps_alone and not request.accumulates
        )
        self._updates = costs.updates if costs.steps_alone else None
        model = request.model
        self.memory = StepMemory(
            parameter_bytes=tensors_bytes(model.parameters()),
            state_bytes=tensors_bytes([*model.parameters(), *model.buffers()])
            - tensors_bytes(model.parameters()),
            input_bytes=batch_bytes(batch) + SCALAR_BYTES,
            optimizer_bytes=costs.optimizer_bytes,
            update_workspace_bytes=0,
            gradient_bytes=sum(p.nbytes for p in self._trained),
            beside_bytes=costs.beside.bytes_beside([*model.parameters(), *model.buffers()]),
        )
        self._returned_bytes = self._held_bytes = 0
        self._pieces = Pieces(costs.device, self._left_bytes, self._update_bytes)
        self._fused = next((name for name in KNOWN_MOVES if name in request.moves), None)
        self._why_unfused = compiler_problem(costs.device) if self._fused else None
        shape = fused_form([self._fused]) if self._fused and not self._why_unfused else None
        self._call = PiecewiseCall(_called_loss, self._pieces, request.progress, shape)

    def _left_bytes(self) -> int | None:
        """Return what is left of the budget for pieces and the Python between them."""
        budget_bytes = self._request.budget_bytes
        if budget_bytes is None:
            return None
        return budget_bytes - self._there_bytes

    @property
    def _there_bytes(self) -> int:
        """What is there before the first piece begins; gradients of earlier batches, too."""
        return self.memory.resident_bytes + self._returned_bytes + self._held_bytes

    def _update_bytes(self) -> int:
        """Return what the update behind the backward allocates for a moment."""
        if self._in_backward:
            return 0
        if self._updates is not None:
            return max(self._updates.cost(p).workspace_bytes for p in self._trained)
        norms = SCALAR_BYTES * len(self._trained) if self._request.clipping.norm else 0
        return max(self._costs.update_workspace_bytes, norms)

    # -- a step

    def runs(self, program: Any) -> bool:
        """Whether a program of a traced loss is this one's: it has none."""
        return False

    def forget(self) -> None:
        """Do nothing: no traced call stands for its programs."""

    def arrange(self) -> None:
        """Do nothing: all is in memory."""

    def run(self, batch: Any, num_steps: int) -> Any:
        """Train one step and return what the loss function does, detached.

        Raises:
            InfeasibleBudgetError: pieces and Python do not fit; nothing is updated.
            UnsupportedModelError: parameters hold gradients already, or the loss calls backward();
                nothing is updated.
            NonFiniteLossError: nothing is updated.
            LossScaleError: no parameter is changed, nor is optimizer state.
        """
        optimizer = self._request.optimizer
        assert optimizer is not None
        refuse_held_gradients(self._trained, self._costs.name_of)
        optimizer.zero_grad(set_to_none=True)
        if self._updates is not None:
            self._updates.begin_step()
        try:
            returned = self._run_batch(batch, num_steps, 1.0)
            self._update(num_steps)
        finally:
            optimizer.zero_grad(set_to_none=True)
        return returned

    def backward(self, batch: Any, num_steps: int, weight: float = 1.0) -> Any:
        """Add a weighted loss's gradients to those there are; return what the loss function does.

        Raises:
            Exception: as `run`; gradients that were there are dropped.
        """
        self._held_bytes = sum(p.grad.nbytes for p in self._trained if p.grad is not None)
        try:
            return self._run_batch(batch, num_steps, weight)
        except BaseException:
            drop_gradients(self._trained)
            raise

    def update(self, num_steps: int) -> None:
        """Update the parameters from the gradients that are there, and drop those."""
        if self._updates is not None:
            self._updates.begin_step()
        try:
            self._update(num_steps)
        finally:
            drop_gradients(self._trained)

    def _run_batch(self, batch: Any, num_steps: int, weight: float) -> Any:
        scaler = self._request.scaler
        try:
            with self._in_terms_of_the_step():
                self._pieces.begin_step(self._held_bytes)
                loss, returned = self._forward(batch, num_steps)
                start = loss if scaler is None else scaler.scale(loss)
                del loss
                with self._updating_in_backward():
                    start.backward(None if weight == 1.0 else torch.full_like(start, weight))
                del start
                self._pieces.end_step()
        except BaseException:
            self._pieces.give_up_step()
            raise
        return returned

    def _update(self, num_steps: int) -> None:
        request, scaler = self._request, self._request.scaler
        assert request.optimizer is not None
        if not self._in_backward:
            scale = 1.0 if scaler is None else scaler.get_scale()
            update_all(request.optimizer, self._trained, request.clipping, scaler, self._updates)
            if scaler is not None:
                names = self._costs.name_of
                gradients = ((names[id(p)], p.grad) for p in self._trained)
                refuse_collapsed_scale(scaler, scale, gradients, num_steps)
        if self._updates is not None:
            self._updates.end_step()

    def _forward(self, batch: Any, num_steps: int) -> tuple[torch.Tensor, Any]:
        """Return the loss, and what the loss function returns, detached."""
        returned = self._call(self._loss_fn, self._request.model, batch)
        if sum(p.grad.nbytes for p in self._trained if p.grad is not None) > self._held_bytes:
            raise UnsupportedModelError(
                f"the loss calls backward(), which is the step's to do\nhint: {BACKWARD_HINT}"
            )
        is_made_up = isinstance(returned, (tuple, list)) and len(returned) > 0
        loss = loss_of(returned) if is_made_up else returned
        if not isinstance(loss, torch.Tensor) or loss.shape != ():
            is_tensor = isinstance(loss, torch.Tensor)
            what = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
            raise UnsupportedModelError(
                f"loss_fn must return one scalar tensor, or a tuple that begins with one; it "
                f"returned {what}\nhint: take the mean or the sum"
            )
        if not loss.requires_grad:
            raise UnsupportedModelError(
                "the loss does not depend on any parameter that needs a gradient"
            )
        value = loss.detach()
        if not bool(torch.isfinite(value)):
            raise NonFiniteLossError(num_steps, float(value))
        result = with_loss(detached(returned), value)
        # What the step before returned is there until the loop gets this.
        self._returned_bytes = batch_bytes(result)
        return loss, result

    @contextmanager
    def _updating_in_backward(self) -> Iterator[None]:
        """Have each parameter updated as soon as its gradient is complete."""
        if not self._in_backward:
            yield
            return
        updates, clip_value = self._updates, self._request.clipping.value
        assert updates is not None

        def update(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert isinstance(parameter, nn.Parameter)
            if gradient is None:  # nothing came back to it
                return
            with torch.no_grad():
                if clip_value is not None:
                    gradient.clamp_(-clip_value, clip_value)
                updates.apply(parameter, gradient)

        hooks = [p.register_post_accumulate_grad_hook(update) for p in self._trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _in_terms_of_the_step(self) -> Iterator[None]:
        """Say of a budget that is too small what the whole step needs."""
        try:
            yield
        except InfeasibleBudgetError as error:
            memory, budget_bytes = self.memory, self._request.budget_bytes
            assert budget_bytes is not None
            resident = [
                ("parameters", memory.parameter_bytes + memory.state_bytes),
                ("optimizer state", memory.optimizer_bytes),
                ("batch", memory.input_bytes),
                ("gradients of earlier batches", self._held_bytes),
                ("beside the step", memory.beside_bytes),
            ]
            live = [(name, size) for name, size in (*resident, *error.peak_buffers) if size]
            raise InfeasibleBudgetError(
                budget_bytes,
                self._there_bytes + error.smallest_bytes,
                error.peak_operation,
                sorted(live, key=lambda item: -item[1]), error.hint,
            ) from None

    # -- what it tells

    @property
    def _planned(self) -> PlannedPath:
        latest = self._pieces.latest
        if latest is None:
            raise self.no_graph("train two steps before asking for the plan")
        return latest

    def no_graph(self, hint: str) -> GraphBreakError:
        """Return the error that says where the loss breaks."""
        first = self._first_break
        return GraphBreakError(
            first.file, first.line, first.cause,
            f"{first.hint}; fit trains such a loss in pieces, which are planned together after the "
            f"second step: {hint}",
        )

    @property
    def plan(self) -> Plan:
        """The plan of all pieces together.

        Raises:
            GraphBreakError: it is not made yet.
        """
        return self._planned.plan.plan

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step, everything resident included."""
        return self._there_bytes + self.plan.peak_bytes

    def how_it_runs(self) -> list[tuple[str, str]]:
        """Return (name, text): where the loss breaks, and what is not done to such a step."""
        first, reason = self._first_break, "the loss is no one graph"
        made = {UpdateInBackward.name} if self._in_backward else set()
        why_not = dict.fromkeys(self._request.moves - {UpdateInBackward.name}, reason)
        if self._fused and self._why_unfused:
            why_not[self._fused] = f"nothing can be compiled here: {self._why_unfused}"
        elif self._fused:
            made.add(self._fused)
            del why_not[self._fused]
        return [
            ("pieces", f"the loss breaks at {first.file}:{first.line}: {first.cause}"),
            ("moves", ", ".join(sorted(made, reverse=True)) or "none"),
            *((f"without {name}", why) for name, why in sorted(why_not.items())),
        ]

    def describe(self) -> str:
        """Return a few lines: pieces, breaks and what they cost, the peak."""
        first = self._first_break
        lines = [f"pieces                the loss breaks at {first.file}:{first.line}"]
        if self._pieces.latest is None:
            lines.append("                      they are planned after the second step")
            return "\n".join(lines)
        planned, budget_bytes = self._planned, self._request.budget_bytes
        for n, piece in enumerate(planned.pieces):
            if not piece.cause:
                continue
            after = next(
                k for k, s in enumerate(planned.path.sections) if s.run == n and s.is_forward
            )
            gap = planned.path.gaps[after + 1]
            lines.append(
                f"break {n + 1:<16}{piece.place}: {piece.cause}\n{'':<22}Python holds "
                f"{format_bytes(gap.held_bytes)}, {format_bytes(gap.peak_bytes)} for a moment"
            )
        for place, reason in self._pieces.left_out.items():
            lines.append(f"{'in eager PyTorch':<22}{place}: {reason}")
        limit = "no limit" if budget_bytes is None else format_bytes(budget_bytes)
        lines.append(f"{'whole step':<22}{format_bytes(self.peak_bytes):>12}  of {limit}")
        lines.append(
            f"{'predicted time':<22}{self.plan.slowdown:.3f} x the pieces without recomputation"
        )
        return "\n".join(lines)


def _called_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Any:
    return loss_fn(model, batch)
