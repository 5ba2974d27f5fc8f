"""Trains with each method on gloo workers, counts what was sent, and writes JSON lines.

    python -m benchmarks.comm
    python -m benchmarks.comm --steps 40 --seeds 0 --only q8 powersgd:1 --out lines.jsonl
    python -m benchmarks.comm --codecs
    python -m benchmarks.comm --rate 100mbit --steps 20

Without --out, lines are added to those that are committed, and the README's tables written anew.
--codecs measures codecs alone, on one core. --rate gives each worker a link of its own (root).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.comm import codecs, report
from benchmarks.comm.methods import METHODS
from benchmarks.comm.network import namespaces, start_in
from benchmarks.comm.train import run, work
from benchmarks.common import read_lines

MODULE = "benchmarks.comm"
FOLDER = Path(__file__).parent
RESULTS, CODECS = FOLDER / "results.jsonl", FOLDER / "codecs.jsonl"


def main() -> int:
    """Run the benchmark; 1 if a worker failed."""
    arguments = _parser().parse_args()
    command = " ".join([f"python -m {MODULE}", *sys.argv[1:]])
    out: Path = arguments.out or (CODECS if arguments.codecs else RESULTS)
    if arguments.rank is not None:
        work(
            arguments.rank, arguments.workers, arguments.only, arguments.steps, arguments.seeds,
            arguments.store, out, command, arguments.rate,
        )
        return 0
    if arguments.report:
        report.write(RESULTS, CODECS)
        return 0
    if arguments.codecs:
        codecs.measure(out, arguments.rounds, arguments.elements, command)
        is_done = True
    elif arguments.rate:
        is_done = _on_network(arguments, out)
    else:
        is_done = run(
            arguments.only, arguments.workers, arguments.steps, arguments.seeds, out, command
        )
    if arguments.out is None:
        report.write(RESULTS, CODECS)
    elif not arguments.codecs:
        print("\n".join(report.table_of_methods(read_lines(out, report.Record))))
    return 0 if is_done else 1


def _on_network(arguments: argparse.Namespace, out: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder, namespaces(
        arguments.workers, arguments.rate
    ) as names:
        workers = [
            start_in(name, [
                MODULE, "--rank", str(rank), "--workers", str(arguments.workers),
                "--steps", str(arguments.steps), "--rate", arguments.rate, "--out", str(out),
                "--store", str(Path(folder, "store")), "--seeds", *map(str, arguments.seeds),
                "--only", *arguments.only,
            ])
            for rank, name in enumerate(names)
        ]
        return all([worker.wait() == 0 for worker in workers])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rate", default="", help="of each worker's link: 100mbit, 1gbit")
    parser.add_argument("--codecs", action="store_true", help="measure codecs alone")
    parser.add_argument("--rounds", type=int, default=20, help="of codecs")
    parser.add_argument("--elements", type=int, default=codecs.NUM_ELEMENTS, help="of codecs")
    parser.add_argument("--report", action="store_true", help="write the tables of what is there")
    parser.add_argument("--out", type=Path, help="lines are added to it")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
