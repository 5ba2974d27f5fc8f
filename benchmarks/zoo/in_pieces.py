"""A family whose graph breaks, through the torch.compile backend: pieces planned together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import first_line
from benchmarks.zoo.outcome import LossFn, Outcome, observe
from benchmarks.zoo.records import SHARES, SMALLEST, Record
from packlight.backend import PacklightBackend
from packlight.capture.dynamo import plain_errors
from packlight.errors import InfeasibleBudgetError
from packlight.planner.pieces import plan_path
from packlight.run.pieces import PlannedPath

# The first step captures the pieces, the second shows what Python does, the third runs as planned.
NUM_WARM_UPS = 3
# A step that is known piece by piece names what it needs so far, and may need more.
NUM_SMALLEST_TRIES = 8


@dataclass
class StepInPieces:
    """One family's forward and backward, which Python interrupts.

    Args:
        model: in training mode.
        batch: of its.
        loss_fn: that breaks.

    Attributes:
        smallest_bytes: for which the pieces have a plan; None until it is known.
        plain_bytes: what the plan of all pieces says without a budget.
        backend: that has captured them.
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFn
    smallest_bytes: int | None = None
    plain_bytes: int = 0

    def __post_init__(self) -> None:
        # Captured once, for all budgets.
        self.backend = PacklightBackend(rehearse=False, progress=False)
        self._call = torch.compile(self.loss_fn, backend=self.backend, dynamic=False)

    def measure(self, record: Record) -> Outcome:
        """Run the step within a record's budget, and fill in what is said of pieces and plan."""
        begin = time.perf_counter()
        if self.smallest_bytes is None:
            self._look_for_smallest()
            record.capture_seconds = time.perf_counter() - begin
        assert self.smallest_bytes is not None
        share = SHARES[record.setting]
        budget_bytes = self.smallest_bytes
        budget_bytes += int(share * max(0, self.plain_bytes - budget_bytes))
        begin = time.perf_counter()
        for _ in range(NUM_SMALLEST_TRIES):
            try:
                outcome, planned = self._run(budget_bytes)
                break
            except InfeasibleBudgetError as error:
                assert error.smallest_bytes > budget_bytes
                refused_bytes, budget_bytes = budget_bytes, error.smallest_bytes
                if record.setting != SMALLEST:
                    record.refused_bytes.append(refused_bytes)
        else:
            raise AssertionError("no budget is ever enough")
        if record.setting == SMALLEST:
            self.smallest_bytes = budget_bytes
        record.plan_seconds = time.perf_counter() - begin
        record.budget_bytes, record.plain_peak_bytes = budget_bytes, self.plain_bytes
        if planned is not None:
            plan = planned.plan.plan
            record.predicted_peak_bytes, record.slowdown = plan.peak_bytes, plan.slowdown
            record.num_pieces = len(planned.pieces)
            record.num_operations = sum(
                len(piece.step.graph.operations) for piece in planned.pieces
            )
            record.breaks = list(dict.fromkeys(first_line(p.cause) for p in planned.pieces
                                               if p.cause))
        return outcome

    def _look_for_smallest(self) -> None:
        """Ask the plan of all pieces for its peaks, without a budget and with a byte."""
        _, planned = self._run(None)
        assert planned is not None, "the step takes another path each time"
        self.plain_bytes = planned.plan.plan.peak_bytes
        try:
            plan_path(planned.path, 1, planned.plan.orders)
        except InfeasibleBudgetError as error:
            self.smallest_bytes = error.smallest_bytes

    def _run(self, budget_bytes: int | None) -> tuple[Outcome, PlannedPath | None]:
        self.backend.loop.begin_anew(budget_bytes)
        with plain_errors():
            outcome = observe(self.model, self.batch, self._call, NUM_WARM_UPS)
        pieces = self.backend.loop.pieces
        return outcome, None if pieces is None else pieces.latest
