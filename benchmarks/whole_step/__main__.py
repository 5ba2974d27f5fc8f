"""Measures every model in a process of its own and appends JSON lines.

    python -m benchmarks.whole_step
    python -m benchmarks.whole_step --quick --models gpt2

A cell whose line is in the file already is left as it is, unless it failed, so an interrupted run
goes on where it stopped; `--fresh` forgets the lines of the models named and measures them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.common import run_apart, write_lines
from benchmarks.whole_step.cases import CASES
from benchmarks.whole_step.records import FOLDER, QUICK_RESULTS, RESULTS, read_records

MODULE = "benchmarks.whole_step"


def main() -> int:
    """Run the benchmark; 1 if a model could not be measured."""
    arguments = _parser().parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    console = Console(stderr=True)
    if out.exists():  # what failed is tried again
        again = [
            r for r in read_records(out)
            if r.model in arguments.models and (arguments.fresh or r.has_failed)
        ]
        write_lines(out, [r for r in read_records(out) if r not in again])
    num_failed = 0
    for name in arguments.models:
        before = len(read_records(out))
        begin = time.perf_counter()
        options = [
            "--measure-one", name, "--out", str(out), "--device", arguments.device,
            "--seed", str(arguments.seed),
            "--command", " ".join([f"python -m {MODULE}", *sys.argv[1:]]),
        ]
        options += ["--quick"] if arguments.quick else []
        options += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
        options += ["--percents", *map(str, arguments.percents)] if arguments.percents else []
        options += ["--offload", str(arguments.offload)] if arguments.offload else []
        is_done = run_apart(MODULE, options)
        num_added = len(read_records(out)) - before
        taken = time.perf_counter() - begin
        console.print(
            f"{name}: {num_added} lines added to {out} in {taken:.0f} s"
            + ("" if is_done else "; it failed, see above"),
            style=None if is_done else "red", highlight=False,
        )
        num_failed += not is_done
    return 1 if num_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few budgets, two rounds")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, help="default: by model, 2 or 3")
    parser.add_argument(
        "--percents", nargs="+", type=int, metavar="N",
        help="budgets in percent of the plain step's peak (default: by model); cells are added",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    parser.add_argument("--offload", type=Path, metavar="DIR", help="also offload to this folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


def _measure_one(arguments: argparse.Namespace) -> None:
    from benchmarks.whole_step.measure import Bench

    case = CASES[arguments.measure_one]
    if arguments.percents:
        percents = tuple(sorted(arguments.percents, reverse=True))
        case = dataclasses.replace(case, percents=percents, quick_percents=percents)
    num_rounds = arguments.rounds or (2 if arguments.quick else case.num_rounds)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        Bench(
            case, arguments.out, arguments.quick, num_rounds, arguments.device, arguments.seed,
            arguments.command, progress, arguments.offload,
        ).run()


if __name__ == "__main__":
    sys.exit(main())
