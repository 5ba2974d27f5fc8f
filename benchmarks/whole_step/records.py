"""Results as JSON lines: one line per model, variant and budget, appended when it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_lines
from benchmarks.workbench import Measured

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "whole_step-quick.jsonl"

EAGER = "eager"
JOINT = "all moves"
SMALLEST = "smallest"


@dataclass
class Record(Measured):
    """What one cell of the benchmark showed, beside what `Measured` has.

    Attributes:
        model: name of the case.
        title: the case in words, with its sizes.
        variant: "eager", something done by hand in eager PyTorch, or the moves Packlight may make.
        setting: the budget in words ("70%"), "" for what has none.
        budget_bytes: for the whole step.
        parameter_bytes: of it, the model's parameters.
        predicted_peak_bytes: of Packlight's plan.
        moves: what Packlight does to fit, in words.
        num_microbatches, num_chunks: how it cuts the batch, and the loss head.
        way_digest: equal where two cells run the same schedules.
        same_as: the setting of the cell whose measurements these are, where both run the same.
        predicted_seconds: of Packlight's plan.
        fit_seconds: capture, profiling and planning.
        smallest_bytes: where the budget is infeasible, the smallest that the error names.
        refused_bytes: budgets that such an error had named, and that were infeasible all the same.
        error: why there is no result.
        num_trained_steps: in the training run, where there is one.
        validation_loss, eager_validation_loss: after those steps.
        training_loss_difference: the largest relative difference of a step's loss in that run.
        provenance: see `benchmarks.common.provenance`.
    """

    model: str
    title: str
    variant: str
    setting: str = ""
    budget_bytes: int | None = None
    parameter_bytes: int = 0
    predicted_peak_bytes: int | None = None
    moves: list[str] = field(default_factory=list)
    num_microbatches: int | None = None
    num_chunks: int | None = None
    way_digest: str | None = None
    same_as: str | None = None
    predicted_seconds: float | None = None
    fit_seconds: float | None = None
    smallest_bytes: int | None = None
    refused_bytes: list[int] = field(default_factory=list)
    error: str | None = None
    num_trained_steps: int = 0
    validation_loss: float | None = None
    eager_validation_loss: float | None = None
    training_loss_difference: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What names the cell among its model's."""
        return self.variant, self.setting

    @property
    def has_failed(self) -> bool:
        """Whether there is no result for a reason other than the budget."""
        return self.error is not None and self.smallest_bytes is None

    @property
    def is_over_budget(self) -> bool:
        """Whether a measured peak is above the budget."""
        if self.budget_bytes is None or self.peak_bytes is None:
            return False
        return self.peak_bytes > self.budget_bytes


# What two cells that run the same schedules have in common.
MEASURED = (
    *(f.name for f in fields(Measured)),
    "num_trained_steps", "validation_loss", "eager_validation_loss", "training_loss_difference",
)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)
