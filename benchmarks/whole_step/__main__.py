"""Measures every model in a process of its own and appends JSON lines.

    python -m benchmarks.whole_step
    python -m benchmarks.whole_step --quick --models gpt2

Budgets are shares of the eager step's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks import by_model
from benchmarks.common import run_apart
from benchmarks.whole_step.cases import CASES
from benchmarks.whole_step.records import QUICK_RESULTS, RESULTS, read_records

MODULE = "benchmarks.whole_step"


def main() -> int:
    """Run the benchmark; 1 if a model could not be measured."""
    arguments = _parser().parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    more = ["--percents", *map(str, arguments.percents)] if arguments.percents else []
    more += ["--offload", str(arguments.offload)] if arguments.offload else []

    def measure_apart(name: str, options: list[str]) -> bool:
        return run_apart(MODULE, options + more)

    return min(1, by_model.measure_all(MODULE, arguments, out, read_records, measure_apart))


def _parser() -> argparse.ArgumentParser:
    parser = by_model.parser(MODULE, __doc__, CASES, RESULTS)
    parser.add_argument(
        "--percents", nargs="+", type=int, metavar="N",
        help="budgets in percent of the plain step's peak (default: by model); cells are added",
    )
    parser.add_argument("--offload", type=Path, metavar="DIR", help="also offload to this folder")
    return parser


def _measure_one(arguments: argparse.Namespace) -> None:
    from benchmarks.whole_step.measure import Bench

    case = CASES[arguments.measure_one]
    if arguments.percents:
        percents = tuple(sorted(arguments.percents, reverse=True))
        case = dataclasses.replace(case, percents=percents, quick_percents=percents)
    num_rounds = arguments.rounds or (2 if arguments.quick else case.num_rounds)
    with by_model.progress() as progress:
        Bench(
            case, arguments.out, arguments.quick, num_rounds, arguments.device, arguments.seed,
            arguments.command, progress, arguments.offload,
        ).run()


if __name__ == "__main__":
    sys.exit(main())
