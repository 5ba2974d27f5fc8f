"""Measures: `python -m benchmarks.sparse [--questions memory speed]`; appends lines."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.common import append_line, provenance
from benchmarks.sparse import accuracy, memory, rival, speed
from benchmarks.sparse.records import RESULTS, Record, read_records

QUESTIONS = ("memory", "speed", "accuracy", "sparselab")


def main() -> int:
    """Measure what is not in results.jsonl yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS[:3])
    parser.add_argument("--densities", nargs="+", type=float, help="of accuracy (0.05 0.02)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    known = {(r.question, r.case, r.method, r.density, r.seed) for r in read_records()}
    for question, case, method, density, seed in _wanted(arguments):
        if (question, case, method, density, seed) in known:
            continue
        values: dict[str, Any]
        if question == "memory":
            values = memory.measured(case, None if method == "dense" else density, method)
        elif question == "speed":
            values = speed.measured(case, density, arguments.rounds)
        elif question == "sparselab":
            values = rival.measured(case, density, arguments.rounds)
        else:
            assert seed is not None
            values = accuracy.measured(method, density, seed, arguments.steps)
        made = provenance(seed or 0, "cpu", shlex.join(["python", "-m", "benchmarks.sparse",
                          *sys.argv[1:]]), ["numba", "sparselab"])
        append_line(RESULTS, Record(question, case, method, density, made, values, seed))
        print(question, case, method, density, seed, values, flush=True)
    return 0


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, float, int | None]]:
    if "memory" in arguments.questions:
        for case in memory.CASES:
            yield "memory", case, "dense", 1.0, None
            for method in ("dsr", "rigl", "deepr"):
                yield "memory", case, method, 0.1, None
    if "speed" in arguments.questions:
        for case in speed.CASES:
            for density in (0.05, 0.1, 0.2, 0.3):
                yield "speed", case, "static", density, None
    if "sparselab" in arguments.questions:
        for case in rival.CASES:
            for density in (0.1, 0.3):
                yield "sparselab", case, "static", density, None
    if "accuracy" in arguments.questions:
        for seed in arguments.seeds:
            for density in arguments.densities or [0.05, 0.02]:
                for method in accuracy.methods(arguments.steps):
                    yield "accuracy", "LeNet-300-100 on MNIST", method, density, seed
            yield "accuracy", "LeNet-300-100 on MNIST", "dense", 1.0, seed


if __name__ == "__main__":
    sys.exit(main())
