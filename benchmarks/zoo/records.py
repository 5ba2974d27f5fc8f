"""Results as JSON lines: one line per family, precision, dropout, way to run it and budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, read_lines
from packlight.capture.joint import CPU_GENERATOR_BYTES

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "zoo-quick.jsonl"

COMPILE = "compile"  # the torch.compile backend: forward and backward
EXACT = "fit, exact moves"  # packlight.fit: the whole step
ALL = "fit, all moves"
PATHS = {"compile": COMPILE, "fit-exact": EXACT, "fit-all": ALL}
SMALLEST = "smallest"
# Budgets between the smallest feasible one and the plain step's peak.
SHARES = {SMALLEST: 0.0, "10%": 0.1, "30%": 0.3, "60%": 0.6, "100%": 1.0}
HALF_WAY = "50%"
MAX_PREDICTION_ERROR = 0.005
# A plan counts the generator's state, and the one set back, for each random operation, whether it
# runs again in the schedule or not. That is much for a step of 300 KB.
GENERATOR_BYTES = 2 * CPU_GENERATOR_BYTES
MAX_GRADIENT_ERROR = 1e-4  # where only sums are rounded in another order


class Config(NamedTuple):
    """Under what a family is trained."""

    dropout: float
    precision: str

    def __str__(self) -> str:
        return f"{self.precision}, dropout {self.dropout:g}"


class Cell(NamedTuple):
    """What names a line among its family's."""

    config: Config
    path: str
    setting: str

    def __str__(self) -> str:
        return f"{self.config}, {self.path}, {self.setting}"


CONFIGS = tuple(Config(d, p) for p in ("fp32", "bf16") for d in (0.0, 0.1))
CONFIGS_BY_NAME = {f"{config.precision}-{config.dropout:g}": config for config in CONFIGS}


def all_cells(quick: bool = False) -> Iterator[Cell]:
    """Yield the cells of every family, in the order in which they are measured."""
    for config in CONFIGS:
        for setting in (SMALLEST,) if quick else SHARES:
            yield Cell(config, COMPILE, setting)
    # Microbatches draw other masks than the whole batch, so they are compared without dropout.
    yield Cell(Config(0.1, "fp32"), EXACT, HALF_WAY)
    yield Cell(Config(0.0, "fp32"), ALL, SMALLEST)


@dataclass
class Record:
    """What one cell showed.

    Attributes:
        family: name of it in tests/zoo/families.py.
        kind: of family.
        dropout: probability, everywhere where the model has one.
        precision: "fp32", or "bf16" for autocast around the loss.
        path: `COMPILE`, `EXACT` or `ALL`.
        setting: where the budget lies between the smallest feasible one and the plain step's peak.
        budget_bytes: what was asked for.
        peak_bytes, predicted_peak_bytes: what was measured, and what the plan says.
        eager_peak_bytes: of the plain eager step, measured.
        plain_peak_bytes: of the plain step as predicted by Packlight.
        refused_bytes: budgets that an error had named as feasible and that were refused.
        differences: names of results whose bits differ from eager's; None if not compared.
        traced_differences: the same from the traced step without a plan; looked at only where
            there are `differences`.
        is_traced_by_torch: whether PyTorch ran that step; where it cannot, or computes something
            else than the loss says, Packlight did, without a budget.
        relative_error: of the first step's gradients, norm of the difference over the norm.
        is_exact: whether what runs is meant to have the same bits.
        draws: whether the step draws random numbers.
        num_operations: of the captured step.
        num_pieces: run in a step whose graph breaks; None where it is one graph.
        breaks: why it does.
        capture_seconds: tracing and profiling; with `fit`, planning as well.
        plan_seconds: planning for this budget, searching for the smallest one included there.
        slowdown: predicted duration over the plain step's.
        moves: what `fit` does beside recomputation.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`.
    """

    family: str
    kind: str
    dropout: float
    precision: str
    path: str
    setting: str
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    eager_peak_bytes: int | None = None
    plain_peak_bytes: int | None = None
    refused_bytes: list[int] = field(default_factory=list)
    differences: list[str] | None = None
    traced_differences: list[str] | None = None
    is_traced_by_torch: bool = True
    relative_error: float | None = None
    is_exact: bool = True
    draws: bool | None = None
    num_operations: int | None = None
    num_pieces: int | None = None
    breaks: list[str] = field(default_factory=list)
    capture_seconds: float | None = None
    plan_seconds: float | None = None
    slowdown: float | None = None
    moves: list[str] = field(default_factory=list)
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """What names it among its family's."""
        return Cell(Config(self.dropout, self.precision), self.path, self.setting)

    @property
    def is_over_budget(self) -> bool:
        """Whether the measured peak is above the budget."""
        if self.budget_bytes is None or self.peak_bytes is None:
            return False
        return self.peak_bytes > self.budget_bytes

    @property
    def prediction_error(self) -> float | None:
        """The predicted peak's relative distance from the measured one."""
        if not self.peak_bytes or self.predicted_peak_bytes is None:
            return None
        return abs(self.predicted_peak_bytes / self.peak_bytes - 1)

    @property
    def bits(self) -> str | None:
        """Whose bits the results have, None if none are promised.

        "eager"; "traced", by PyTorch; "unplanned", Packlight's without a budget; "other".
        """
        if self.differences is None or not self.is_exact:
            return None
        if not self.differences:
            return "eager"
        if self.traced_differences != []:
            return "other"
        return "traced" if self.is_traced_by_torch else "unplanned"

    @property
    def failure(self) -> str | None:
        """What is wrong with it in a word (an error's name), None if nothing is."""
        if self.error is not None:
            return self.error.partition(":")[0].strip()
        if self.is_over_budget:
            return "over budget"
        if self.bits == "other":
            return "other bits"
        if not self.is_exact and not self.draws:
            if self.relative_error is not None and not self.relative_error < MAX_GRADIENT_ERROR:
                return "other gradients"
        if self.refused_bytes:
            return "refused a budget that it named"
        if self._is_mispredicted:
            return "peak mispredicted"
        return None

    @property
    def _is_mispredicted(self) -> bool:
        error = self.prediction_error
        if error is None or error <= MAX_PREDICTION_ERROR:
            return False
        assert self.peak_bytes is not None and self.predicted_peak_bytes is not None
        spare_bytes = self.predicted_peak_bytes - self.peak_bytes
        return not (self.draws and 0 < spare_bytes <= GENERATOR_BYTES)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)


def append_record(path: Path, record: Record) -> None:
    """Add one line to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")
