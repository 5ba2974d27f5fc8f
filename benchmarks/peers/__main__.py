"""Measures every model in a process of its own and appends JSON lines.

    python -m benchmarks.peers
    python -m benchmarks.peers --quick --models gpt2
    PYTHONPATH=peers_site python -m benchmarks.peers --rockmate rockmate_site

The two folders hold rivals' libraries; the README says how they are made. A library that is not
there leaves its error in the table.

A cell whose line is in the file already is left as it is, unless it failed, so an interrupted run
goes on where it stopped; `--fresh` forgets the lines of the models named and measures them again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.common import append_line, provenance, run_apart, write_lines
from benchmarks.peers.cases import CASES
from benchmarks.peers.measure import Bench, title_of
from benchmarks.peers.records import FOLDER, QUICK_RESULTS, RESULTS, Record, read_records
from benchmarks.peers.rivals import ROCKMATE

MODULE = "benchmarks.peers"


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
        # Their peaks are budgets for Packlight, so those that run elsewhere go first.
        if not run_apart(MODULE, [*options, "--apart"], arguments.rockmate):
            _note_end(name, out, arguments)
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
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, help="default: by model, 3 or 5")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    parser.add_argument(
        "--rockmate", type=Path, metavar="DIR", help="where rockmate is installed, see rockmate.py"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


def _measure_one(arguments: argparse.Namespace) -> None:
    case = CASES[arguments.measure_one]
    num_rounds = arguments.rounds or (2 if arguments.quick else case.num_rounds)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        tempfile.TemporaryDirectory() as directory,
    ):
        Bench(
            case, arguments.out, arguments.quick, num_rounds, arguments.device, arguments.seed,
            arguments.command, progress, Path(directory),
        ).run(arguments.apart)


def _note_end(name: str, out: Path, arguments: argparse.Namespace) -> None:
    """A rival that takes its process down with it is a result too."""
    title = title_of(CASES[name], arguments.quick)
    if any((r.model, r.title, r.tool) == (name, title, ROCKMATE) for r in read_records(out)):
        return
    command = " ".join([f"python -m {MODULE}", *sys.argv[1:]])
    made = provenance(arguments.seed, arguments.device, command)
    error = "its process ended without a result"
    append_line(out, Record(name, title, ROCKMATE, error=error, provenance=made))


if __name__ == "__main__":
    sys.exit(main())
