"""Measures every row in a process of its own and appends JSON lines.

    PACKLIGHT_CIFAR10=path/to/cifar10 python -m benchmarks.sohoni
    python -m benchmarks.sohoni --memory-only
    python -m benchmarks.sohoni --rows bf16 --seeds 0 --images 5000 --epochs 6

What is in the file already is left as it is; an interrupted run goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.common import provenance, root_cause, run_apart
from benchmarks.sohoni.records import CHECKPOINTS, QUICK_RESULTS, RESULTS, Record, read_records
from benchmarks.sohoni.rows import ROWS

MODULE = "benchmarks.sohoni"


def main() -> int:
    """Run the benchmark; 1 if a row could not be measured."""
    arguments = _parser().parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    if arguments.quick:
        arguments.images, arguments.epochs, arguments.tested, arguments.seeds = 200, 1, 200, [0]
    console = Console(stderr=True)
    has_failed = False
    seeds: list[int | None] = [] if arguments.train_only else [None]
    seeds += [] if arguments.memory_only else arguments.seeds
    for seed in seeds:
        for name in arguments.rows:
            if any(r.key == (name, seed) and r.error is None for r in read_records(out)):
                continue
            what = "memory and time" if seed is None else f"training with seed {seed}"
            console.print(f"{name}: {what}", highlight=False)
            options = [
                "--measure-one", name, "--out", str(out), "--rounds", str(arguments.rounds),
                "--images", str(arguments.images), "--epochs", str(arguments.epochs),
                "--tested", str(arguments.tested), "--checkpoints", str(arguments.checkpoints),
                "--command", " ".join([f"python -m {MODULE}", *sys.argv[1:]]),
            ]
            options += [] if seed is None else ["--train-seed", str(seed)]
            has_failed |= not run_apart(MODULE, options)
    return int(has_failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--memory-only", action="store_true", help="no training")
    which.add_argument(
        "--train-only", action="store_true", help="no memory and time: for a machine that is busy"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch of 200 images, one seed")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--images", type=int, default=10_000, help="of the training set")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tested", type=int, default=10_000, help="images of the test set")
    parser.add_argument("--out", type=Path, help="default: results.jsonl of this folder")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--measure-one", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--train-seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    return parser


def _measure_one(arguments: argparse.Namespace) -> None:
    from benchmarks.sohoni.measure import Training, measure_memory, train

    seed = arguments.train_seed
    record = Record(
        arguments.measure_one, seed, provenance=provenance(seed or 0, "cpu", arguments.command)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        if seed is None:
            measure_memory(record, arguments.rounds)
        else:
            training = Training(
                arguments.images, arguments.epochs, num_tested=arguments.tested
            )
            record.schedule = asdict(training)
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                train(record, training, arguments.checkpoints, progress)
    except Exception as error:  # a failure is a result too
        record.error = root_cause(error)
        Console(stderr=True).print_exception()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
