"""What two planners made of the same steps, as a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import mebibytes, table

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
SAME, BETTER, WORSE = "same", "better", "worse"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Line:
    """One step within one budget.

    Attributes:
        step: model and kind.
        is_linked: whether there was a disk to offload to.
        setting: which budget.
        old, new: what `worker.plan` printed.
        provenance: see `benchmarks.common.provenance`.
    """

    step: str
    is_linked: bool
    setting: str
    old: dict[str, Any]
    new: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the new plan is faster, or there is one where there was none."""
        before, after = self.old["seconds"], self.new["seconds"]
        if before is None or after is None:
            return SAME if before == after else BETTER if before is None else WORSE
        if abs(after - before) <= TOLERANCE * before:
            return SAME
        return BETTER if after < before else WORSE

    @property
    def ratio(self) -> float | None:
        """New duration over old."""
        before, after = self.old["seconds"], self.new["seconds"]
        return None if before is None or after is None else after / before


def report(lines: list[Line]) -> list[str]:
    """Return the tables, and where they were made."""
    rows = [
        [
            line.step + (", disk" if line.is_linked else ""),
            line.setting,
            mebibytes(line.old["budget_bytes"]),
            *(_slowdown(record) for record in (line.old, line.new)),
            line.verdict,
            *(f"{record['cpu_seconds']:.1f}" for record in (line.old, line.new)),
            f"{line.new['smallest_bytes'] / line.old['smallest_bytes']:.4f}",
        ]
        for line in lines
    ]
    header = [
        "step", "budget", "MiB", "x plain, before", "after", "", "planning s, before", "after",
        "smallest",
    ]
    made = lines[-1].provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return [
        *summary(lines), "", *table(header, rows), "",
        f"{made['hardware']}, commit {made['commit']}, {versions}, {made['timestamp']}.",
    ]


def summary(lines: list[Line]) -> list[str]:
    """Return how many plans are better, the same or worse, by budget, and how much longer."""
    rows = []
    for setting in dict.fromkeys(line.setting for line in lines):
        mine = [line for line in lines if line.setting == setting]
        ratios = [line.ratio for line in mine if line.ratio is not None]
        planning = [
            line.new["cpu_seconds"] / line.old["cpu_seconds"]
            for line in mine if line.old["cpu_seconds"] > 0.1
        ]
        rows.append([
            setting,
            *(str(sum(line.verdict == v for line in mine)) for v in (SAME, BETTER, WORSE)),
            f"{statistics.fmean(ratios):.4f}" if ratios else "-",
            f"{max(ratios):.4f}" if ratios else "-",
            f"{statistics.median(planning):.2f}" if planning else "-",
            f"{_cpu_seconds(mine, 'new') / _cpu_seconds(mine, 'old'):.2f}",
        ])
    header = [
        "budget", SAME, BETTER, WORSE, "step's seconds after / before", "most",
        "planning's, median", "all together",
    ]
    return table(header, rows)


def _slowdown(record: dict[str, Any]) -> str:
    if record["seconds"] is None:
        return "infeasible"
    return f"{record['seconds'] / record['plain_seconds']:.4f}"


def _cpu_seconds(lines: list[Line], whose: str) -> float:
    return sum(float(getattr(line, whose)["cpu_seconds"]) for line in lines)
