"""Results as JSON lines: one line per model, tool and setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import read_lines

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"


@dataclass
class Record:
    """What one cell of the benchmark showed.

    Attributes:
        model: name of the case.
        title: the case in words, with its sizes.
        tool: "eager", "packlight" or a rival.
        setting: of the tool.
        rival: for Packlight at a rival's peak, that rival ("tool, setting").
        budget_bytes: what Packlight was given.
        peak_bytes: measured: forward, loss and backward, above what was there before.
        predicted_peak_bytes: of Packlight's plan.
        ratio_median, ratio_quartiles: time over that of the eager steps around it in its round.
        num_rounds: how many rounds those are taken over.
        seconds_median: duration of a step.
        predicted_slowdown: of Packlight's plan, over the plain captured step.
        compile_seconds: the first step, capture and planning included.
        plan_seconds: of it, planning.
        planner_bytes: the most that planning held (tracemalloc), where it was watched.
        num_operations: of the captured step.
        same_bits: whether loss, gradients and buffers are bit-identical to eager's.
        gradient_error: the largest difference from eager's gradients over the largest of those.
        error: why there is no result.
        same_as: the cell that this one's times were taken from, where both run the same schedule.
    """

    model: str
    title: str
    tool: str
    setting: str
    rival: str | None = None
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    num_rounds: int = 0
    seconds_median: float | None = None
    predicted_slowdown: float | None = None
    compile_seconds: float | None = None
    plan_seconds: float | None = None
    planner_bytes: int | None = None
    num_operations: int | None = None
    same_bits: dict[str, bool] | None = None
    gradient_error: float | None = None
    error: str | None = None
    same_as: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return tool and setting."""
        return f"{self.tool}, {self.setting}" if self.setting else self.tool


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)
