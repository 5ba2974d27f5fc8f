"""The smallest peak that a step has, call by call and in fused kernels.

    python -m benchmarks.fused.smallest
    python -m benchmarks.fused.smallest --cases vit

A budget of one byte is asked for; the error names the smallest that there is. What is told beside
it is without parameters, optimizer state and batch, which no kernel makes smaller. Nothing is
timed. Lines are appended to smallest.jsonl, a table is printed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import packlight
from benchmarks.common import append_line, mebibytes, provenance, table
from benchmarks.fused.__main__ import CASES
from benchmarks.models import Case
from packlight.errors import InfeasibleBudgetError

MODULE = "benchmarks.fused.smallest"
RESULTS = Path(__file__).with_name("smallest.jsonl")
# No chunks: where the loss runs a few rows at a time, no kernel holds the peak.
WITHOUT = ("update-in-backward", "pack")
MOVES = {"call by call": WITHOUT, "fused": (*WITHOUT, "fuse")}


@dataclass(kw_only=True)
class Record:
    """The smallest peak of one step."""

    model: str
    how: str
    smallest_bytes: int
    resident_bytes: int
    provenance: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["gpt", "vit"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
    records = [_record(CASES[name], how) for name in arguments.cases for how in MOVES]
    for record in records:
        record.provenance = told
        append_line(arguments.out, record)
    print("\n".join(_table(records)))
    return 0


def _record(case: Case, how: str) -> Record:
    built = case.build(False, "cpu", 0)
    given = built.model, built.loss_fn, case.optimizer(built.model), built.batch
    resident_bytes = packlight.profile(*given, progress=False).memory.resident_bytes
    try:
        packlight.plan(*given, 1, moves=MOVES[how], progress=False)
    except InfeasibleBudgetError as error:
        return Record(
            model=case.title, how=how, smallest_bytes=error.smallest_bytes,
            resident_bytes=resident_bytes,
        )
    raise AssertionError("nothing runs in one byte")


def _table(records: list[Record]) -> list[str]:
    rows = []
    for plain, fused in zip(records[::2], records[1::2], strict=True):
        beside = [r.smallest_bytes - r.resident_bytes for r in (plain, fused)]
        rows.append([
            plain.model, mebibytes(plain.smallest_bytes), mebibytes(fused.smallest_bytes),
            *map(mebibytes, beside), f"{beside[1] / beside[0]:.2f}",
        ])
    header = ["step", "smallest, MiB", "fused", "beside what is resident", "fused", "ratio"]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
