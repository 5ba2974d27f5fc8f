"""Pieces in a loop of the user's own: steps begin and end where autograd says so.

A step begins with the first forward behind a backward, or where nothing of a forward is left:
several forwards before a backward are one step. It is over when the backward ends; a path that is
new is planned outside of it, before an optimizer steps or the next forward begins. Gradients that
are there when a step begins, since backwards before it have left them, are the budget's, too.

A function that nothing breaks is one piece, and has a plan for the step that calls it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from packlight.capture.pieces import Piece
from packlight.errors import InfeasibleBudgetError
from packlight.run.pieces import Pieces, note_left_out
from packlight.torch_internals.autograd import when_backward_ends
from packlight.torch_internals.optimizers import BeforeAnyStep


class PieceLoop:
    """A host of pieces (capture/pieces.py) that nobody tells where steps begin.

    Args:
        budget_bytes: for what a step allocates, from its first forward to its last backward; None
            for no limit.

    Attributes:
        pieces: runs them; None until a piece is captured.
        is_broken: whether any of them is a piece of something larger.
        num_runs: how often any graph was called.
        left_out: functions that dynamo left to eager PyTorch: "file:line name" -> why.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self._budget_bytes = budget_bytes
        self.pieces: Pieces | None = None
        self.is_broken = False
        self.num_runs = 0
        self.left_out: dict[str, str] = {}
        self._parameters: dict[int, weakref.ref[nn.Parameter]] = {}
        # Bytes of those that were there when the step began, by their parameters' ids.
        self._gradients_before: dict[int, int] = {}
        # Whose forward began the step; None outside of steps.
        self._first: Piece | None = None
        # Whether a call of the function began the step, and no piece of it has run yet.
        self._is_called = False
        self._is_over = self._is_end_awaited = False

    @property
    def _gradient_bytes(self) -> int:
        return sum(self._gradients_before.values())

    def _left_bytes(self) -> int | None:
        return None if self._budget_bytes is None else self._budget_bytes - self._gradient_bytes

    def _gradients(self) -> dict[int, torch.Tensor]:
        alive = ((key, known()) for key, known in self._parameters.items())
        return {key: p.grad for key, p in alive if p is not None and p.grad is not None}

    def _new_gradients(self) -> list[torch.Tensor]:
        return [g for key, g in self._gradients().items() if key not in self._gradients_before]

    def counting(self, graph: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled graph whose calls are counted."""

        def run(*arguments: Any) -> Any:
            self.num_runs += 1
            return graph(*arguments)

        return run

    # -- what capture tells

    def observing(self) -> None:
        """Record no levels in this step: a call is about to be observed alone."""
        if self.pieces is not None:
            self.pieces.observing()

    def captured(self, piece: Piece) -> None:
        """Take note of a new piece."""
        if self.pieces is None:
            self.pieces = self._new_pieces(piece.step.device)
        self.is_broken = self.is_broken or piece.plan is None
        self.pieces.captured(piece)

    def _new_pieces(self, device: torch.device) -> Pieces:
        return Pieces(device, self._left_bytes, gradients=self._new_gradients)

    def begin_anew(self, budget_bytes: int | None) -> None:
        """Run what is captured within another budget, outside of steps; what was planned is over.

        Args:
            budget_bytes: as at first; no step that is to come knows of the earlier one.
        """
        self._budget_bytes, self._first, self._is_over = budget_bytes, None, False
        if self.pieces is not None:
            self.pieces.give_up_step()
            self.pieces = self._new_pieces(self.pieces.device)

    def left_to_eager(self, code: CodeType, reason: str) -> None:
        """Take note of a function that runs uncompiled: what it calls is compiled in pieces.

        A call of which nothing is compiled is refused once it is over (backend.py).
        """
        self.is_broken = True
        note_left_out(self.left_out, code, reason)

    # -- calls

    def call_begins(self) -> None:
        """Begin a step with a call of what breaks: what Python does first counts, too."""
        is_new = self._first is None or self._is_over
        if self.pieces is not None and self.is_broken and is_new and torch.is_grad_enabled():
            self._finish()
            self._begin(self.pieces, None)
            self._is_called = True

    def call_ends(self) -> None:
        """Forget a step of which no piece has run."""
        if self._is_called and self.pieces is not None:
            self.pieces.leave_step()
        self._is_called = False

    # -- sections

    def forward(self, piece: Piece, primals: list[Any]) -> tuple[list[Any], torch.Tensor | None]:
        """Run a piece's forward, in a new step where one begins."""
        pieces = self.pieces
        assert pieces is not None, "it was captured"
        self._parameters.update(
            (id(p), weakref.ref(p)) for p in primals if isinstance(p, nn.Parameter)
        )
        is_evaluated_again = self._first is piece and not pieces.is_in_step
        if self._is_called:
            self._first, self._is_called = piece, False
        elif self._first is None or self._is_over or is_evaluated_again:
            self._finish()
            self._begin(pieces, piece)
        with self._in_terms_of_the_budget():
            return pieces.forward(piece, primals)

    def backward(self, piece: Piece, token: torch.Tensor, tangents: list[Any]) -> list[Any]:
        """Run the backward of a run."""
        pieces = self.pieces
        assert pieces is not None, "it was captured"
        self._is_over = False  # of several losses each has a backward
        with self._in_terms_of_the_budget():
            gradients = pieces.backward(piece, token, tangents)
        if not self._is_end_awaited:
            self._is_end_awaited = True
            when_backward_ends(self._backward_ended)
        return gradients

    @contextmanager
    def _in_terms_of_the_budget(self) -> Iterator[None]:
        """Count, in an error, the gradients that were there when the step began."""
        try:
            yield
        except InfeasibleBudgetError as error:
            if not self._gradient_bytes:
                raise
            live = [("gradients of earlier backwards", self._gradient_bytes), *error.peak_buffers]
            raise InfeasibleBudgetError(
                error.budget_bytes + self._gradient_bytes,
                error.smallest_bytes + self._gradient_bytes,
                error.peak_operation,
                sorted(live, key=lambda item: -item[1]),
                error.hint or "zero_grad() drops gradients that nobody is to add to",
            ) from None

    # -- steps

    def _begin(self, pieces: Pieces, first: Piece | None) -> None:
        self._gradients_before = {key: g.nbytes for key, g in self._gradients().items()}
        self._first, self._is_over = first, False
        self._is_end_awaited = False  # the backward that it waited for may have failed
        is_captured = first is not None and first.plan is not None
        pieces.begin_step(self._gradient_bytes, is_captured)

    def _backward_ended(self) -> None:
        self._is_end_awaited = False
        if self.pieces is not None and self._first is not None and not self._is_over:
            self._is_over = True
            self.pieces.end_sections()
            if self.pieces.is_recording:
                # A profiler is stopped outside of the backward, and soon: there can be only one.
                _finish_before_a_step(self)

    def _finish(self) -> None:
        """End the step that is over, outside of its backward; plan its path, if it is new."""
        _waiting.discard(self)
        pieces, was_over = self.pieces, self._is_over
        first, self._first, self._is_over = self._first, None, False
        if pieces is not None and first is not None:
            if was_over:
                with self._in_terms_of_the_budget():
                    pieces.end_step()
            else:
                pieces.leave_step()


# Loops whose step is over and recorded; all are told of the next step of any optimizer. The hook is
# never taken away: that must not happen while hooks are called.
_waiting: weakref.WeakSet[PieceLoop] = weakref.WeakSet()
_hooks: list[Any] = []


def _finish_before_a_step(loop: PieceLoop) -> None:
    _waiting.add(loop)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(BeforeAnyStep(_a_step_begins)))


def _a_step_begins() -> None:
    for loop in list(_waiting):
        loop._finish()
