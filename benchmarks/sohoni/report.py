"""Writes the table of the README from the JSON lines: `python -m benchmarks.sohoni.report`."""

from __future__ import annotations

import statistics
import sys

from benchmarks.common import (
    first_line,
    median_and_quartiles,
    replace_between_markers,
    table,
)
from benchmarks.sohoni.records import FOLDER, RESULTS, Record, read_records
from benchmarks.sohoni.rows import MEGABYTE, ROWS

HEADER = [
    "row", "paper, MB", "measured peak, MB", "counted as in the paper, MB", "reduction (measured)",
    "time", "accuracy, %", "paper's accuracy", "moves",
]


def main() -> int:
    """Write the table."""
    records = read_records(RESULTS)
    if not records:
        print(f"no results in {RESULTS}: run `make bench-sohoni` first", file=sys.stderr)
        return 1
    replace_between_markers(FOLDER / "README.md", "sohoni", results_section(records))
    return 0


def results_section(records: list[Record]) -> list[str]:
    """Return the README's section about these records."""
    memory = {r.row: r for r in records if r.seed is None}
    runs = {name: [r for r in records if r.row == name and r.accuracy is not None] for name in ROWS}
    base = memory.get("fp32")
    rows = []
    for name, row in ROWS.items():
        record = memory.get(name)
        if record is None:
            continue
        if record.error is not None or record.peak_bytes is None:
            rows.append([row.title, "", first_line(record.error), *[""] * (len(HEADER) - 3)])
            continue
        reduction = "-"
        if base is not None and base.peak_bytes is not None:
            reduction = f"{base.peak_bytes / record.peak_bytes:.1f}x"
        rows.append([
            row.title,
            "-" if row.paper is None else f"{row.paper.megabytes}",
            _megabytes(record.peak_bytes),
            _megabytes(record.paper_bytes),
            reduction,
            median_and_quartiles(record.ratio_median, record.ratio_quartiles),
            _accuracy([r.accuracy for r in runs[name] if r.accuracy is not None]),
            "-" if row.paper is None else f"{row.paper.accuracy}",
            ", ".join(record.moves) or "-",
        ])
    made = (base or records[0]).provenance
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    lines = [*table(HEADER, rows), "", f"{made['hardware']}, {versions}, commit {made['commit']}."]
    schedules = {tuple(r.schedule.items()) for found in runs.values() for r in found}
    for schedule in sorted(schedules):
        about = dict(schedule)
        lines.append(
            f"Accuracy: {about['num_epochs']} epochs of the first {about['num_images']:,} training "
            f"images, tested on {about['num_tested']:,}; mean over seeds, least and most."
        )
    return lines


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MEGABYTE:.1f}"


def _accuracy(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"
    return f"{statistics.mean(values):.2f}" + (spread if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
