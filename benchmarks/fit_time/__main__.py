"""Times `fit` by this checkout beside another one's, in fresh processes that take turns.

    python -m benchmarks.fit_time --baseline ../before
    python -m benchmarks.fit_time --baseline ../before --quick

Each turn fits three times: with an empty cache, with the times of calls that the first fit left
there, and, where ways to run a step are kept as well, with everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import (
    KEEP_FREED_MEMORY,
    ROOT,
    append_line,
    provenance,
    read_lines,
    replace_between_markers,
)
from benchmarks.fit_time.cases import CASES
from benchmarks.fit_time.records import (
    BASELINE,
    COLD,
    FOLDER,
    MINE,
    QUICK_RESULTS,
    RESULTS,
    SAVED,
    WARM,
    Record,
)
from benchmarks.fit_time.report import report

MODULE = "benchmarks.fit_time"
# How ways are called in the cache's folder.
WAYS = "ways*"


def main() -> int:
    """Run the benchmark; 1 if a process ended without a result."""
    arguments = _parser().parse_args()
    out: Path = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    if arguments.fresh and out.exists():
        out.unlink()
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]), ("numba",))
    sides = {MINE: ROOT}
    if arguments.baseline is not None:
        sides = {BASELINE: arguments.baseline.resolve(), **sides}
    console = Console(stderr=True)
    has_failed = False
    for round_index in range(arguments.rounds):
        for case in arguments.cases:
            for side in list(sides)[:: 1 if round_index % 2 == 0 else -1]:
                for record in _turn(case, side, sides[side], round_index, arguments.quick):
                    record.provenance = told
                    append_line(out, record)
                    has_failed = has_failed or record.error is not None
                    console.print(_line(record), highlight=False)
    lines = report(read_lines(out, Record))
    if out == RESULTS:
        replace_between_markers(FOLDER / "README.md", "fit-time", lines)
    else:
        print("\n".join(lines))
    return 1 if has_failed else 0


def _turn(
    case: str, side: str, checkout: Path, round_index: int, quick: bool
) -> Iterator[Record]:
    """Yield the fits of one checkout that share a cache; later ones get the first one's budget."""
    budget_bytes: int | None = None
    with tempfile.TemporaryDirectory() as cache:
        for state in (COLD, WARM, SAVED):
            if state == WARM:
                _forget_ways(Path(cache))
            if state == SAVED and not list(Path(cache).glob(WAYS)):
                continue
            record = Record(case, side, state, _commit(checkout), round_index)
            record.budget_bytes = budget_bytes
            _fill(record, checkout, Path(cache), quick)
            budget_bytes = record.budget_bytes
            yield record


def _forget_ways(cache: Path) -> None:
    for path in cache.glob(WAYS):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fill(record: Record, checkout: Path, cache: Path, quick: bool) -> None:
    command = [sys.executable, "-P", str(FOLDER / "trial.py"), "--case", record.case]
    environment = {
        **os.environ, **KEEP_FREED_MEMORY, "PACKLIGHT_CACHE": str(cache),
        "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1",
    }
    if record.budget_bytes is not None:
        command += ["--budget", str(record.budget_bytes)]
    done = subprocess.run(
        [*command, *["--quick"] * quick], cwd=cache, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        record.error = (done.stderr.strip().splitlines() or [""])[-1][:300]
        return
    found: dict[str, Any] = json.loads(lines[-1])
    for name, value in found.items():
        setattr(record, name, value)


def _line(record: Record) -> str:
    result = record.error or record.moves or f"{record.smallest_bytes} bytes would do"
    return (
        f"{record.case}, {record.side}, with {record.state}: {record.seconds:.1f} s "
        f"({record.cpu_seconds:.1f} s of processors); {result}"
    )


def _commit(checkout: Path) -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--baseline", type=Path, help="another checkout to run beside this one")
    parser.add_argument("--quick", action="store_true", help="models of a few blocks")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget the lines that are there")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
