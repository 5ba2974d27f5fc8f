"""Measures every model in a process of its own and writes JSON lines.

    python -m benchmarks.spine
    python -m benchmarks.spine --quick --models wrn

A model whose lines are in the file already is left as it is, so an interrupted run goes on where it
stopped; `--fresh` measures it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import ROOT, run_apart, write_lines
from benchmarks.spine.cases import CASES
from benchmarks.spine.records import FOLDER, RESULTS, Record, read_records

QUICK_RESULTS = ROOT / ".cache" / "spine-quick.jsonl"


def main() -> int:
    """Run the benchmark; 1 if a model could not be measured."""
    arguments = _parser().parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    console = Console(stderr=True)
    failed = 0
    for name in arguments.models:
        records = read_records(out)
        known = [r for r in records if r.model == name]
        if known and not arguments.fresh:
            made = known[0].provenance
            console.print(
                f"{name}: {len(known)} lines of {made.get('timestamp')} (commit "
                f"{made.get('commit')}) are in {out}; --fresh measures again", highlight=False,
            )
            continue
        begin = time.perf_counter()
        found = _in_a_process(name, arguments)
        if found is None:
            console.print(f"{name}: failed, see above", style="red")
            failed += 1
            continue
        write_lines(out, [r for r in read_records(out) if r.model != name] + found)
        taken = time.perf_counter() - begin
        console.print(f"{name}: {len(found)} lines in {taken:.0f} s", highlight=False)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, help="rounds (default: by model, 3 to 5)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


def _in_a_process(name: str, arguments: argparse.Namespace) -> list[Record] | None:
    """Measure one model in a new process, which returns all of its memory when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        options = [
            "--models", name, "--measure-one", str(path),
            "--device", arguments.device, "--seed", str(arguments.seed),
            "--command", " ".join(["python -m benchmarks.spine", *sys.argv[1:]]),
        ]
        options += ["--quick"] if arguments.quick else []
        options += ["--repeats", str(arguments.repeats)] if arguments.repeats else []
        return read_records(path) if run_apart("benchmarks.spine", options) else None


def _measure_one(arguments: argparse.Namespace) -> None:
    from benchmarks.spine.measure import Bench

    case = CASES[arguments.models[0]]
    num_rounds = arguments.repeats or (2 if arguments.quick else case.num_rounds)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bench = Bench(
            case, arguments.quick, num_rounds, arguments.device, arguments.seed, arguments.command,
            progress,
        )
        write_lines(arguments.measure_one, bench.run())


if __name__ == "__main__":
    sys.exit(main())
