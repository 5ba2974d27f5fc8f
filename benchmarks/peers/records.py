"""Results as JSON lines: one line per model, tool and setting, appended when it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_lines
from benchmarks.workbench import Measured

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "peers-quick.jsonl"
REMATCHES = FOLDER / "rematches.jsonl"
QUICK_REMATCHES = ROOT / ".cache" / "peers-rematches-quick.jsonl"

EAGER = "eager"
FULL, HALF = "all of eager's", "half of eager's"
SMALLEST, ABOVE_SMALLEST = "smallest", "smallest + 10%"


@dataclass
class Record(Measured):
    """What one cell of the benchmark showed, beside what `Measured` has.

    Attributes:
        model: name of the case.
        title: the case in words, with its sizes.
        tool: "eager", a rival, or a way to use Packlight.
        setting: of the tool; for Packlight its budget in words.
        changes: what it changes beside memory and time, in words.
        is_ours: whether it is Packlight's.
        budget_bytes: for the whole step, where the tool is given one.
        parameter_bytes: of the model.
        predicted_peak_bytes: of Packlight's plan.
        predicted_seconds: of Packlight's plan.
        moves: what Packlight does to fit, in words.
        way_digest: equal where two cells run the same schedules.
        same_as: the cell whose measurements these are, where both run the same.
        prepare_seconds: the first step, compilation included, or capture, profiling and planning.
        cell_seconds: all that the cell took of the benchmark's time.
        smallest_bytes: where the budget is infeasible, the smallest that the error names.
        refused_bytes: budgets that such an error had named, and that were infeasible all the same.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`.
    """

    model: str
    title: str
    tool: str
    setting: str = ""
    changes: str = ""
    is_ours: bool = False
    budget_bytes: int | None = None
    parameter_bytes: int = 0
    predicted_peak_bytes: int | None = None
    predicted_seconds: float | None = None
    moves: list[str] = field(default_factory=list)
    way_digest: str | None = None
    same_as: str | None = None
    prepare_seconds: float | None = None
    cell_seconds: float = 0.0
    smallest_bytes: int | None = None
    refused_bytes: list[int] = field(default_factory=list)
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What names the cell among its model's."""
        return self.tool, self.setting

    @property
    def name(self) -> str:
        """Tool and setting."""
        return f"{self.tool}, {self.setting}" if self.setting else self.tool

    @property
    def has_failed(self) -> bool:
        """Whether there is no result for a reason other than the budget."""
        return self.error is not None and self.smallest_bytes is None

    @property
    def was_timed(self) -> bool:
        """Whether it has a point in the plot."""
        return self.ratio_median is not None and self.peak_bytes is not None

    @property
    def ratio(self) -> float:
        """Time over eager's; eager's own is 1, what was measured of it is noise."""
        assert self.ratio_median is not None
        return 1.0 if self.tool == EAGER else self.ratio_median


@dataclass
class Rematch:
    """A rival and one of Packlight's cells, timed in the same rounds.

    Attributes:
        model, title: as in `Record`.
        rival, ours: names of the two records.
        ratio_median, ratio_quartiles: Packlight's time over the rival's.
        num_rounds: how many rounds those are taken over.
        seconds_median, rival_seconds_median: durations of a step.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`.
    """

    model: str
    title: str
    rival: str
    ours: str
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    num_rounds: int = 0
    seconds_median: float | None = None
    rival_seconds_median: float | None = None
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the two among all."""
        return self.model, self.title, self.rival, self.ours

    @property
    def ratio(self) -> float:
        """The median; there is one."""
        assert self.ratio_median is not None
        return self.ratio_median

    @property
    def has_failed(self) -> bool:
        """Whether there is no result."""
        return self.error is not None


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)


def read_rematches(path: Path) -> list[Rematch]:
    """Return the rematches of a file; none if it does not exist."""
    return read_lines(path, Rematch)
