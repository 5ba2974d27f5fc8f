"""At inductor's own peaks: planned steps with fused kernels, without, and inductor, in turns.

    python -m benchmarks.fused
    python -m benchmarks.fused --cases gpt --rounds 9

Inductor runs first, with all activations kept and with half of them (`activation_memory_budget`);
its whole peaks are Packlight's budgets. All steps of a case then take turns, in each round in
another order. A ratio is a step's time over that of the inductor step whose peak is its budget, in
the same round. Lines are appended to results.jsonl, a table is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import packlight
from benchmarks.common import (
    KEEP_FREED_MEMORY,
    append_line,
    mebibytes,
    provenance,
    quartiles,
    root_cause,
    table,
)
from benchmarks.models import Built, Case, LossFn, adamw, momentum_sgd
from benchmarks.peers.compiled import inductor
from benchmarks.workbench import Measured, Reference, Step, Workbench
from packlight.capture.dynamo import prepare_dynamo

MODULE = "benchmarks.fused"
RESULTS = Path(__file__).with_name("results.jsonl")
RATIOS = (1.0, 0.5)
INDUCTOR = "inductor"
_GPT = {"layers": 3, "width": 192, "vocabulary": 4096, "length": 128, "batch_size": 4}
CASES = {
    case.name: case
    for case in (
        Case("gpt", "GPT (3 x 192, sequence 128, batch 4), AdamW", "reference_gpt", adamw, _GPT),
        Case("vit", "ViT (3 x 64, 65 tokens, batch 4), AdamW", "vit", adamw),
        Case("wrn", "WRN-28-2 (32 x 32, batch 8), SGD", "wrn", momentum_sgd, {"batch_size": 8}),
        Case("unet", "U-Net, SGD with momentum", "unet", momentum_sgd),
    )
}
MOVES = tuple(name for name in packlight.MOVES if name != "offload")
EXACT = tuple(name for name in packlight.EXACT_MOVES if name != "offload")
OURS = {
    "Packlight": MOVES,
    "Packlight, groups": (*MOVES, "group-updates"),
    "Packlight, fuse": (*MOVES, "channels-last", "fuse", "group-updates"),
    "Packlight, exact": EXACT,
    "Packlight, exact, fuse-exactly": (*EXACT, "fuse-exactly"),
}


@dataclass(kw_only=True)
class Record(Measured):
    """One step: of whom, in what precision and budget, what was predicted and measured."""

    model: str
    precision: str
    tool: str
    activation_budget: float
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    prepare_seconds: float | None = None
    moves: str = ""
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the benchmark; 1 if a step failed."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--tools", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
    prepare_dynamo()  # inductor's steps trace through what Packlight's trace through
    records: list[Record] = []
    for name in arguments.cases:
        for precision in arguments.precisions:
            bench = _Bench(CASES[name], precision, arguments.tools)
            records += bench.measured(arguments.rounds)
    for record in records:
        record.provenance = told
        append_line(arguments.out, record)
    print("\n".join(_table(records)))
    return int(any(record.error for record in records))


class _Bench:
    """The steps of one model in one precision."""

    def __init__(self, case: Case, precision: str, tools: list[str]) -> None:
        self.case, self.precision, self.tools = case, precision, tools
        self.built = case.build(False, "cpu", 0)
        self.reference: Reference | None = None
        self.ready: list[tuple[Record, Workbench, Step]] = []
        self.console = Console(stderr=True)

    def measured(self, num_rounds: int) -> list[Record]:
        """Return a record of each step."""
        records = []
        for ratio in RATIOS:
            record = self._add(INDUCTOR, ratio, None)
            records.append(record)
            for tool in self.tools if record.error is None else ():
                records.append(self._add(tool, ratio, record.peak_bytes))
        self._time(num_rounds)
        return records

    def _add(self, tool: str, ratio: float, budget_bytes: int | None) -> Record:
        """Prepare a step and look at what it holds and computes."""
        record = Record(
            model=self.case.name, precision=self.precision, tool=tool, activation_budget=ratio,
            budget_bytes=budget_bytes,
        )
        built = self.built.another()
        bench = Workbench(built, [self.case.optimizer(built.model)], "cpu", 0)
        start = time.perf_counter()
        try:
            if budget_bytes is None:
                step = bench.eager_step(self._under_precision(inductor(built, ratio)))
                step(built.batch)
            else:
                step = self._fitted(built, bench, record, OURS[tool])
            record.prepare_seconds = time.perf_counter() - start
            if self.reference is None:
                self.reference = self._eager_reference()
            bench.look_at(record, step, self.reference)
            self.ready.append((record, bench, step))
        except Exception as error:
            record.error = root_cause(error)
        self.console.print(f"{self.case.name} {self.precision}: {tool} {ratio:g} "
                           f"{record.error or record.moves}", highlight=False, markup=False)
        return record

    def _eager_reference(self) -> Reference:
        built = self.built.another()
        bench = Workbench(built, [self.case.optimizer(built.model)], "cpu", 0)
        bench.built.loss_fn = self._under_precision(built.loss_fn)
        return bench.reference

    def _fitted(
        self, built: Built, bench: Workbench, record: Record, moves: tuple[str, ...]
    ) -> packlight.TrainStep:
        allow = ("bf16",) if self.precision == "bf16" else ()
        step = packlight.fit(
            built.model, built.loss_fn, bench.optimizer, built.batch, record.budget_bytes,
            moves=moves, allow=allow, progress=False,
        )
        record.predicted_peak_bytes = step.peak_bytes
        told = re.search(r"^moves +(.*)$", step.describe(), re.M)
        record.moves = told.group(1) if told else ""
        return step

    def _under_precision(self, loss_fn: LossFn) -> LossFn:
        if self.precision == "fp32":
            return loss_fn

        def under_autocast(model: torch.nn.Module, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_fn(model, batch)

        return under_autocast

    def _time(self, num_rounds: int) -> None:
        seconds: list[list[float]] = [[] for _ in self.ready]
        shuffler = random.Random(0)
        for _, bench, step in self.ready:
            bench.timed_step(step)
        for _ in range(num_rounds):
            order = list(range(len(self.ready)))
            shuffler.shuffle(order)
            for place in order:
                _, bench, step = self.ready[place]
                seconds[place].append(bench.timed_step(step))
        theirs = {
            record.activation_budget: seconds[place]
            for place, (record, _, _) in enumerate(self.ready) if record.tool == INDUCTOR
        }
        for place, (record, _, _) in enumerate(self.ready):
            beside = theirs[record.activation_budget]
            ratios = [a / b for a, b in zip(seconds[place], beside, strict=True)]
            record.num_rounds = num_rounds
            record.seconds_median = statistics.median(seconds[place])
            record.ratio_median = statistics.median(ratios)
            record.ratio_quartiles = quartiles(ratios)


def _table(records: list[Record]) -> list[str]:
    header = ["step", "MiB", "predicted - measured, bytes", "time over inductor's", "error"]
    rows = []
    for r in records:
        name = f"{r.model} {r.precision}, {r.tool} at {r.activation_budget:g}"
        if r.error or r.ratio_median is None:
            rows.append([name, r.error or "", "", "", ""])
            continue
        off = ""
        if r.predicted_peak_bytes is not None and r.peak_bytes is not None:
            off = str(r.predicted_peak_bytes - r.peak_bytes)
        spread = "" if r.ratio_quartiles is None else "{:.2f} to {:.2f}".format(*r.ratio_quartiles)
        error = "" if r.update_error is None else f"{r.update_error:.1e}"
        rows.append([name, mebibytes(r.peak_bytes), off, f"{r.ratio_median:.3f} ({spread})", error])
    return table(header, rows)


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-m", MODULE, *sys.argv[1:]], environment)
    sys.exit(main())
