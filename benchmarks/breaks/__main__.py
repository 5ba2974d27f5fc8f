"""Steps that break at half of their peak, beside the same without breaks, in turns.

    python -m benchmarks.breaks
    python -m benchmarks.breaks --cases gpt --rounds 9 --share 0.6
    python -m benchmarks.breaks --report

A line for each case is appended to results.jsonl; the table goes into README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.breaks.cases import CASES, CHECKPOINTS, Case
from benchmarks.common import (
    ROOT,
    append_line,
    first_line,
    mebibytes,
    median_and_quartiles,
    percent_off,
    provenance,
    quartiles,
    read_lines,
    replace_between_markers,
    root_cause,
    table,
    timed,
)
from benchmarks.zoo.outcome import LossFn, Outcome, Start, observe
from packlight.backend import PacklightBackend
from packlight.capture.dynamo import plain_errors
from packlight.errors import InfeasibleBudgetError
from packlight.run.pieces import PlannedPath

MODULE = "benchmarks.breaks"
RESULTS = Path(__file__).with_name("results.jsonl")
# Captured, seen, planned, and once more.
NUM_WARM_UPS = 4
NUM_TRIES = 8


@dataclass(kw_only=True)
class Record:
    """What one case showed.

    Attributes:
        model, rival: see `Case`.
        eager_peak_bytes: of the plain step, above what was there before.
        budget_bytes: for the step that breaks.
        refused_bytes: the budget that was asked for at first, where that was refused.
        peak_bytes, predicted_peak_bytes: of the step that breaks.
        rival_peak_bytes: of the other one.
        num_pieces: of the step.
        python_held_bytes, python_peak_bytes: the most that Python between pieces holds when it
            ends, and allocates for a moment.
        is_eager: whether loss, gradients, buffers have all of eager PyTorch's bits.
        ratio_median, ratio_quartiles: time over the rival's in the same round.
        eager_ratio_median, eager_ratio_quartiles: over eager PyTorch's.
        num_rounds: how many.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`.
    """

    model: str
    rival: str
    eager_peak_bytes: int | None = None
    budget_bytes: int | None = None
    refused_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    rival_peak_bytes: int | None = None
    num_pieces: int | None = None
    python_held_bytes: int | None = None
    python_peak_bytes: int | None = None
    is_eager: bool | None = None
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    eager_ratio_median: float | None = None
    eager_ratio_quartiles: tuple[float, float] | None = None
    num_rounds: int = 0
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the benchmark; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="%(default)s")
    parser.add_argument("--share", type=float, default=0.5, help="of the peak, %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_failed = 0
    if not arguments.report:
        told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
        for name in arguments.cases:
            record = Record(model=name, rival=CASES[name].rival, provenance=told)
            try:
                measure(CASES[name], record, arguments.share, arguments.rounds)
            except Exception as error:
                record.error = root_cause(error)
                num_failed += 1
            append_line(arguments.out, record)
    records = read_lines(arguments.out, Record)
    lines = report(records)
    print("\n".join(lines))
    if arguments.out == RESULTS:
        replace_between_markers(ROOT / "benchmarks" / "breaks" / "README.md", "breaks", lines)
    return int(num_failed > 0)


def measure(case: Case, record: Record, share: float, num_rounds: int) -> None:
    """Fill in what a case shows.

    Args:
        case: which.
        record: to be filled in.
        share: of eager PyTorch's peak: the budget.
        num_rounds: of steps in turns.
    """
    model, batch, loss_fn = case.make(False)
    start = Start(model)
    eager = observe(model, batch, loss_fn)
    record.eager_peak_bytes = eager.peak_bytes
    record.budget_bytes = int(share * eager.peak_bytes)
    mine = _planned(model, batch, loss_fn, record)
    record.is_eager = not mine.outcome.differences(eager)
    record.peak_bytes = mine.outcome.peak_bytes
    path = mine.path
    if path is not None:
        record.predicted_peak_bytes = path.plan.plan.peak_bytes
        record.num_pieces = len(path.pieces)
        gaps = path.path.gaps
        record.python_held_bytes = max(gap.held_bytes for gap in gaps)
        record.python_peak_bytes = max(gap.peak_bytes for gap in gaps)

    other, other_batch, other_loss = case.make(True)
    other_start = Start(other)
    call = other_loss
    if case.rival == CHECKPOINTS:
        outcome = observe(other, other_batch, call)
    else:
        backend = PacklightBackend(record.budget_bytes, progress=False)
        call = torch.compile(other_loss, backend=backend, fullgraph=True, dynamic=False)
        outcome = observe(other, other_batch, call, NUM_WARM_UPS)
    record.rival_peak_bytes = outcome.peak_bytes

    def step(call: LossFn, which: Any, given: Any, begin: Start) -> float:
        begin.restore()
        return timed(lambda: call(which, given).backward(), torch.device("cpu"))

    ratios, eager_ratios = [], []
    for number in range(num_rounds):
        turns = [
            ("mine", (mine.call, model, batch, start)),
            ("rival", (call, other, other_batch, other_start)),
            ("eager", (loss_fn, model, batch, start)),
        ]
        turns = turns[number % 3 :] + turns[: number % 3]
        seconds = {name: step(*what) for name, what in turns}
        ratios.append(seconds["mine"] / seconds["rival"])
        eager_ratios.append(seconds["mine"] / seconds["eager"])
    record.num_rounds = num_rounds
    record.ratio_median, record.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
    record.eager_ratio_median = statistics.median(eager_ratios)
    record.eager_ratio_quartiles = quartiles(eager_ratios)


@dataclass(frozen=True)
class _Planned:
    """A step that breaks, planned."""

    call: LossFn
    outcome: Outcome
    path: PlannedPath | None


def _planned(model: Any, batch: Any, loss_fn: LossFn, record: Record) -> _Planned:
    """Plan a step for a record's budget; where that is refused, for the one that is named."""
    for _ in range(NUM_TRIES):
        torch._dynamo.reset()
        backend = PacklightBackend(record.budget_bytes, progress=False)
        call: LossFn = torch.compile(loss_fn, backend=backend, dynamic=False)
        try:
            with plain_errors():
                outcome = observe(model, batch, call, NUM_WARM_UPS)
        except InfeasibleBudgetError as error:
            record.refused_bytes = record.refused_bytes or record.budget_bytes
            record.budget_bytes = error.smallest_bytes
            continue
        pieces = backend.loop.pieces
        return _Planned(call, outcome, None if pieces is None else pieces.latest)
    raise AssertionError("no budget is ever enough")


def report(records: list[Record]) -> list[str]:
    """Return the table of the newest line of each case."""
    newest = {record.model: record for record in records}
    rows = []
    for record in newest.values():
        if record.error is not None:
            rows.append([record.model, record.rival, first_line(record.error), *[""] * 8])
            continue
        asked = "" if record.refused_bytes is None else f" ({mebibytes(record.refused_bytes)})"
        rows.append([
            record.model, record.rival, mebibytes(record.eager_peak_bytes),
            mebibytes(record.budget_bytes) + asked, mebibytes(record.peak_bytes),
            percent_off(record.predicted_peak_bytes, record.peak_bytes),
            mebibytes(record.rival_peak_bytes), str(record.num_pieces or "-"),
            f"{mebibytes(record.python_held_bytes)}, {mebibytes(record.python_peak_bytes)}",
            median_and_quartiles(record.ratio_median, record.ratio_quartiles or ()),
            median_and_quartiles(record.eager_ratio_median, record.eager_ratio_quartiles or ()),
        ])
    header = ["step", "rival", "eager, MiB", "budget, MiB", "peak, MiB", "prediction off by",
              "rival's peak, MiB", "pieces", "Python holds, for a moment, MiB", "x rival",
              "x eager"]
    last = [record.provenance for record in newest.values() if record.provenance][-1:]
    where = [
        f"{p['hardware']}, one thread, load {p['load_at_start']} at the start, "
        + ", ".join(f"{n} {v}" for n, v in p["versions"].items())
        + f", commit {p['commit']}, {p['timestamp']}; `{p['command']}`." for p in last
    ]
    return ["", *table(header, rows, right_from=2), "", *where, ""]


if __name__ == "__main__":
    sys.exit(main())
