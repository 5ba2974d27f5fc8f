"""Results as JSON lines: one line per row for its memory, one per row and seed for its accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_lines

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "sohoni-quick.jsonl"
CHECKPOINTS = ROOT / ".cache" / "sohoni"


@dataclass
class Record:
    """What one row showed: its memory (`seed` is None), or a training run.

    Attributes:
        row: its name.
        seed: of a training run.
        budget_bytes: what `fit` was given.
        peak_bytes: everything a step holds, measured: weights, batch norm's statistics, gradients,
            momentum, batch, activations and workspace.
        predicted_peak_bytes: of Packlight's plan.
        paper_bytes: counted as in the paper: weights, gradients, momentum, and what is kept of a
            microbatch for the backward.
        moves: what Packlight does to fit.
        ratio_median, ratio_quartiles: time over that of the fp32 eager step in the same round.
        num_rounds: of those.
        seconds_median: of a step.
        schedule: of a training run: images, epochs, learning rate.
        accuracy: on the test set, in percent.
        losses: mean training loss of each epoch.
        train_seconds: of the run, over all its parts.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`.
    """

    row: str
    seed: int | None = None
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    paper_bytes: int | None = None
    moves: list[str] = field(default_factory=list)
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    num_rounds: int = 0
    seconds_median: float | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    accuracy: float | None = None
    losses: list[float] = field(default_factory=list)
    train_seconds: float | None = None
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int | None]:
        """What names the line."""
        return self.row, self.seed


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)
