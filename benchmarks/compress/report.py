"""The tables of this folder's README, from its results."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from benchmarks.common import read_lines, replace_between_markers, table
from benchmarks.compress.__main__ import RESULTS, Record

FOLDER = Path(__file__).resolve().parent


def spread(values: list[float], digits: int) -> str:
    """Return the median, and the range if there are several."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) < 2:
        return median
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(records: list[Record]) -> list[str]:
    """Return the lines of the table of files, and of what they were made on."""
    rows = []
    for network, method in dict.fromkeys((r.network, r.method) for r in records):
        of_kind = [r for r in records if (r.network, r.method) == (network, method)]
        rows.append([
            network,
            method,
            spread([r.dense_error_percent for r in of_kind], 2),
            spread([r.error_percent for r in of_kind], 2),
            spread([r.num_nonzeros for r in of_kind], 0),
            spread([r.file_bytes for r in of_kind], 0),
            spread([r.dense_bytes / r.file_bytes for r in of_kind], 1),
            spread([sum(r.seconds.values()) for r in of_kind], 0),
            ", ".join(str(r.seed) for r in of_kind),
        ])
    header = [
        "network", "method", "error before, %", "after, %", "not zero", "bytes of the file",
        "times smaller", "CPU s", "seeds",
    ]  # fmt: skip
    made = records[-1].provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return [
        *table(header, rows, right_from=2), "",
        f"{made['hardware']}, one thread, commit {made['commit']}, {versions}, "
        f"{made['timestamp']}.",
    ]  # fmt: skip


def main() -> int:
    """Write the table into the README."""
    records = read_lines(RESULTS, Record)
    if not records:
        print(f"{RESULTS} has no results", file=sys.stderr)
        return 2
    replace_between_markers(FOLDER / "README.md", "compress", tables(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
