"""Measures every model in a process of its own and appends JSON lines.

    python -m benchmarks.peers
    python -m benchmarks.peers --quick --models gpt2
    PYTHONPATH=peers_site python -m benchmarks.peers --rockmate rockmate_site

The two folders hold rivals' libraries; the README says how they are made. A library that is not
there leaves its error in the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import by_model
from benchmarks.common import append_line, provenance, run_apart
from benchmarks.peers.cases import CASES
from benchmarks.peers.measure import Bench, title_of
from benchmarks.peers.records import QUICK_RESULTS, RESULTS, Record, read_records
from benchmarks.peers.rivals import ROCKMATE

MODULE = "benchmarks.peers"


def main() -> int:
    """Run the benchmark; 1 if a model could not be measured."""
    arguments = _parser().parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)

    def measure_apart(name: str, options: list[str]) -> bool:
        # Their peaks are budgets for Packlight, so those that run elsewhere go first.
        if not run_apart(MODULE, [*options, "--apart"], arguments.rockmate):
            _note_end(name, out, arguments)
        return run_apart(MODULE, options)

    return min(1, by_model.measure_all(MODULE, arguments, out, read_records, measure_apart))


def _parser() -> argparse.ArgumentParser:
    parser = by_model.parser(MODULE, __doc__, CASES, RESULTS)
    parser.add_argument(
        "--rockmate", type=Path, metavar="DIR", help="where rockmate is installed, see rockmate.py"
    )
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    return parser


def _measure_one(arguments: argparse.Namespace) -> None:
    case = CASES[arguments.measure_one]
    num_rounds = arguments.rounds or (2 if arguments.quick else case.num_rounds)
    with by_model.progress() as progress, tempfile.TemporaryDirectory() as directory:
        Bench(
            case, arguments.out, arguments.quick, num_rounds, arguments.device, arguments.seed,
            arguments.command, progress, Path(directory),
        ).run(arguments.apart)


def _note_end(name: str, out: Path, arguments: argparse.Namespace) -> None:
    """A rival that takes its process down with it is a result too."""
    title = title_of(CASES[name], arguments.quick)
    if any((r.model, r.title, r.tool) == (name, title, ROCKMATE) for r in read_records(out)):
        return
    made = provenance(arguments.seed, arguments.device, by_model.command(MODULE))
    error = "its process ended without a result"
    append_line(out, Record(name, title, ROCKMATE, error=error, provenance=made))


if __name__ == "__main__":
    sys.exit(main())
