"""Measures every family in a process of its own and appends JSON lines.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --quick --only gpt2 unet
    python -m benchmarks.zoo --only mamba --fresh

A cell whose line is in the file already is left as it is, so an interrupted run goes on where it
stopped; `--fresh` forgets the lines of the families named and measures them again. A family that
takes too long, or whose process dies, leaves a line that says so for every cell it did not reach.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.common import provenance, status_apart, write_lines
from benchmarks.zoo.measure import cells_to_measure, measure_family, new_record
from benchmarks.zoo.records import (
    CONFIGS_BY_NAME,
    FOLDER,
    PATHS,
    QUICK_RESULTS,
    RESULTS,
    Cell,
    all_cells,
    append_record,
    read_records,
)
from tests.zoo.families import FAMILIES

MODULE = "benchmarks.zoo"


def main() -> int:
    """Run the benchmark; 1 if a family's process did not end well."""
    arguments = _parser().parse_args()
    arguments.out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    names = arguments.only or list(FAMILIES)
    if arguments.fresh:
        kept = [r for r in read_records(arguments.out) if r.family not in names]
        write_lines(arguments.out, kept)
    console = Console(stderr=True)
    num_failed = 0
    for index, name in enumerate(names):
        begin = time.perf_counter()
        trouble = _measured_apart(name, arguments)
        if trouble is None:
            continue
        num_failed += bool(trouble)
        mine = [r for r in read_records(arguments.out) if r.family == name]
        failures = dict.fromkeys(r.failure for r in mine if r.failure is not None)
        console.print(
            f"{index + 1} of {len(names)}, {name}: {len(mine)} cells, "
            f"{time.perf_counter() - begin:.0f} s"
            + "".join(f"; {failure}" for failure in failures),
            style="red" if failures else None, highlight=False,
        )
    return 1 if num_failed else 0


def _measured_apart(name: str, arguments: argparse.Namespace) -> str | None:
    """Measure what is lacking of a family; return what went wrong, None if nothing was lacking."""
    cells = _cells(arguments)
    if not cells_to_measure(name, cells, arguments.out):
        return None
    command = " ".join([f"python -m {MODULE}", *sys.argv[1:]])
    options = ["--measure-one", name, "--out", str(arguments.out), "--command", command]
    options += ["--seed", str(arguments.seed), *(["--quick"] if arguments.quick else [])]
    options += ["--paths", *arguments.paths, "--configs", *arguments.configs]
    trouble = ""
    try:
        status = status_apart(MODULE, options, arguments.limit_seconds)
    except subprocess.TimeoutExpired:
        trouble = f"TimeLimit: not within {arguments.limit_seconds:g} s for the whole family"
    else:
        if status < 0:
            trouble = f"Crash: the process was ended by {signal.Signals(-status).name}"
        elif status > 0:
            trouble = f"Crash: the process ended with exit status {status}"
    missing = cells_to_measure(name, cells, arguments.out) if trouble else []
    if missing:
        trouble += f"; it was at {missing[0]}"
    made = provenance(arguments.seed, "cpu", command)
    for cell in missing:
        record = new_record(name, cell, made)
        record.error = trouble
        append_record(arguments.out, record)
    return trouble


def _measure_one(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)  # sums over threads may come in any order
    name = arguments.measure_one
    cells = cells_to_measure(name, _cells(arguments), arguments.out)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)
        measure_family(
            name, cells, arguments.out, arguments.seed, arguments.command,
            lambda what: progress.update(task, description=f"{name}: {what}"),
        )


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    paths = [PATHS[name] for name in arguments.paths]
    configs = [CONFIGS_BY_NAME[name] for name in arguments.configs]
    return [c for c in all_cells(arguments.quick) if c.path in paths and c.config in configs]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument(
        "--paths", nargs="+", choices=list(PATHS), default=list(PATHS), help="default: all"
    )
    names = list(CONFIGS_BY_NAME)
    parser.add_argument(
        "--configs", nargs="+", choices=names, default=names, help="precision and dropout"
    )
    parser.add_argument("--quick", action="store_true", help="only the smallest budgets")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="for each family")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-one", choices=list(FAMILIES), help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
