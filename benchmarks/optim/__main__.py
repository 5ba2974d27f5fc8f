"""Measures every optimizer in a process of its own; writes JSON lines and the README's table.

    python -m benchmarks.optim
    python -m benchmarks.optim --quick
    PYTHONPATH=folder-with-bitsandbytes-and-torchao python -m benchmarks.optim

A library that is not installed leaves its error in the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.common import (
    first_line,
    median_and_quartiles,
    read_lines,
    replace_between_markers,
    run_apart,
    table,
    write_lines,
)
from benchmarks.optim.cases import CASES
from benchmarks.optim.measure import FOLDER, QUICK_RESULTS, RESULTS, Record, measure

MODULE = "benchmarks.optim"


def main() -> int:
    """Run the benchmark; 1 if a process ended without a result."""
    arguments = _parser().parse_args()
    out: Path = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    if arguments.measure_one:
        record = measure(
            arguments.measure_one, arguments.elements, arguments.rounds, arguments.threads,
            arguments.seed, arguments.command,
        )
        write_lines(out, [*read_lines(out, Record), record])
        return 0
    if arguments.quick:
        arguments.elements, arguments.rounds = 2**18, 3
    console = Console(stderr=True)
    again = [f"{r.tool}: {r.name}" for r in read_lines(out, Record)]
    keys = list(arguments.only or CASES)
    if again:
        write_lines(
            out, [r for r in read_lines(out, Record) if f"{r.tool}: {r.name}" not in keys]
        )
    has_failed = False
    for key in keys:
        console.print(key, highlight=False)
        is_done = run_apart(MODULE, [
            "--measure-one", key, "--out", str(out), "--seed", str(arguments.seed),
            "--elements", str(arguments.elements), "--rounds", str(arguments.rounds),
            "--threads", str(arguments.threads),
            "--command", " ".join([f"python -m {MODULE}", *sys.argv[1:]]),
        ])
        has_failed = has_failed or not is_done
    records = sorted(
        read_lines(out, Record), key=lambda r: list(CASES).index(f"{r.tool}: {r.name}")
    )
    write_lines(out, records)
    lines = report(records)
    if out == RESULTS:
        replace_between_markers(FOLDER / "README.md", "optim", lines)
    else:
        print("\n".join(lines))
    return 1 if has_failed else 0


def report(records: list[Record]) -> list[str]:
    """Return the lines of the table and what it was measured on."""
    rows = []
    for record in records:
        if record.error is not None:
            rows.append([record.tool, record.name, first_line(record.error), *["-"] * 4])
            continue
        assert record.state_bytes is not None and record.transient_bytes is not None
        assert record.first_transient_bytes is not None
        transient_bytes = max(record.transient_bytes, record.first_transient_bytes)
        rows.append([
            record.tool,
            record.name,
            f"{record.parameter_bytes / record.num_elements:.2f}",
            f"{record.state_bytes / record.num_elements:.3f}",
            f"{transient_bytes / record.num_elements:.3f}",
            f"{1e3 * (record.seconds_median or 0):.1f}",
            median_and_quartiles(record.ratio_median, record.ratio_quartiles),
        ])
    header = [
        "library", "optimizer", "weight, bytes per parameter", "state", "transient", "ms", "time"
    ]
    versions: dict[str, str] = {}
    for record in records:
        versions.update(record.provenance["versions"])
    made = records[0].provenance
    return [
        *table(header, rows, right_from=2),
        "",
        f"{made['hardware']}, {records[0].num_threads} used, "
        f"one tensor of {records[0].num_elements} elements, {max(r.num_rounds for r in records)} "
        f"rounds, load {made['load_at_start']} at the start, commit {made['commit']}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f", {made['timestamp']}.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small tensor, three rounds")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="KEY", help="some cases")
    parser.add_argument("--elements", type=int, default=2**22, help="a multiple of 1024")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    parser.add_argument("--measure-one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
