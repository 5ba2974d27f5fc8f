"""Runs one model's cells, each beside eager steps of its own, and appends each line at once."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import packlight
from benchmarks.common import MEBIBYTE, append_line, provenance, root_cause
from benchmarks.whole_step.cases import QUICK_VARIANT_PERCENTS, Case
from benchmarks.whole_step.records import (
    EAGER,
    JOINT,
    MEASURED,
    SMALLEST,
    Record,
    read_records,
)
from benchmarks.whole_step.steps import TrainingBench
from benchmarks.workbench import fit_smallest, smallest_bytes, way_digest
from packlight import MOVES
from packlight.errors import InfeasibleBudgetError
from packlight.moves.chunk.move import Chunk
from packlight.planner import plan_whole_step
from packlight.search import plan_way
from packlight.search.words import moves_of
from packlight.step import Plan, StepGraph
from packlight.updates.accounting import tensors_bytes

# What `fit` may do beside recomputation, which is never forbidden.
VARIANTS: dict[str, tuple[str, ...]] = {
    "recompute only": (),
    "recompute + update-in-backward": ("update-in-backward",),
    "recompute + microbatch": ("microbatch",),
    "recompute + chunk": ("chunk",),
    # Where "alone" is said, recomputation is forbidden, too.
    "microbatch alone": ("microbatch",),
}
OFFLOAD_VARIANTS: dict[str, tuple[str, ...]] = {
    "offload alone": ("offload",),
    f"{JOINT} + offload": MOVES,
    "recompute + offload": ("offload",),
    "recompute only": (),
}
WITHOUT_OFFLOAD = tuple(name for name in MOVES if name != "offload")


class Bench:
    """All cells of one model.

    Args:
        case: which model.
        out: where lines are appended; cells that it holds are not measured again.
        quick: small sizes, few budgets.
        num_rounds: how often each cell is timed.
        seed: of model, batch and dropout.
        command: what the user typed, for the records.
        progress: shows what runs.
        offload_directory: where `fit` may offload to; None for not at all.
    """

    def __init__(
        self, case: Case, out: Path, quick: bool, num_rounds: int, device: str, seed: int,
        command: str, progress: Progress, offload_directory: Path | None = None,
    ) -> None:
        self.case, self.out, self.quick, self.num_rounds = case, out, quick, num_rounds
        self.progress, self.offload_directory = progress, offload_directory
        self.title = f"small trial instead of {case.title}" if quick else case.title
        self.provenance = provenance(seed, device, command)
        known = [r for r in read_records(out) if (r.model, r.title) == (case.name, self.title)]
        self.done = {r.key: r for r in known}
        self.bench = TrainingBench(case, quick, device, seed, self._say)
        self.parameter_bytes = tensors_bytes(self.bench.parameters)
        self.task = progress.add_task(case.name, total=None)

    def run(self) -> int:
        """Measure what is lacking; return how many lines were added."""
        num_known = len(self.done)
        bench = self.bench
        for name, loss_fn in {EAGER: bench.built.loss_fn, **bench.by_hand()}.items():
            measure = functools.partial(
                bench.measure, step=bench.eager_step(loss_fn), num_rounds=self.num_rounds
            )
            self._cell(name, "", None, measure)
        eager = self.done[EAGER, ""]
        peak_bytes = eager.peak_bytes
        if peak_bytes is None:
            raise RuntimeError(f"{self.case.name}: the eager step failed: {eager.error}")
        self._sweep(peak_bytes)
        for mebibytes in self.case.above_parameters_mib:
            budget_bytes = self.parameter_bytes + mebibytes * MEBIBYTE
            self._fit(JOINT, f"parameters + {mebibytes} MiB", budget_bytes, WITHOUT_OFFLOAD)
        percents = QUICK_VARIANT_PERCENTS if self.quick else self.case.variant_percents
        variants = {name: VARIANTS[name] for name in self.case.variants}
        cells = [(name, moves, percent) for name, moves in variants.items() for percent in percents]
        if self.offload_directory is not None:
            offload_percents = QUICK_VARIANT_PERCENTS if self.quick else self.case.offload_percents
            cells += [
                (name, OFFLOAD_VARIANTS[name], percent)
                for name in self.case.offload_variants for percent in offload_percents
            ]
        for name, moves, percent in cells:
            self._fit(name, f"{percent}%", peak_bytes * percent // 100, moves)
        self.progress.remove_task(self.task)
        return len(self.done) - num_known

    def _sweep(self, eager_peak_bytes: int) -> None:
        """Budgets downwards until none fits, then the smallest."""
        smallest = None
        for percent in self.case.quick_percents if self.quick else self.case.percents:
            record = self._fit(
                JOINT, f"{percent}%", eager_peak_bytes * percent // 100, WITHOUT_OFFLOAD
            )
            smallest = record.smallest_bytes
            if record.error is not None:
                break
        if (JOINT, SMALLEST) in self.done:
            return
        if smallest is None:
            self._say("the smallest budget")
            smallest = smallest_bytes(functools.partial(self._fitted, moves=WITHOUT_OFFLOAD))
        self._fit(JOINT, SMALLEST, smallest, WITHOUT_OFFLOAD)

    # -- cells

    def _cell(
        self, variant: str, setting: str, budget_bytes: int | None,
        measure: Callable[[Record], None],
    ) -> Record:
        """Return a cell's record: the known one, or a new one that is appended to the file."""
        if (variant, setting) in self.done:
            return self.done[variant, setting]
        record = Record(
            self.case.name, self.title, variant, setting, budget_bytes,
            parameter_bytes=self.parameter_bytes, provenance=self.provenance,
        )
        self._say(record.setting + ", " * bool(setting) + variant)
        try:
            measure(record)
        except InfeasibleBudgetError as error:
            record.error, record.smallest_bytes = root_cause(error), error.smallest_bytes
        except Exception as error:  # a failure is a result too
            record.error = root_cause(error)
        append_line(self.out, record)
        self.done[variant, setting] = record
        torch._dynamo.reset()  # what was compiled for this cell holds its programs
        gc.collect()
        return record

    def _fit(
        self, variant: str, setting: str, budget_bytes: int, moves: tuple[str, ...]
    ) -> Record:
        def measure(record: Record) -> None:
            begin = time.perf_counter()
            if setting == SMALLEST:
                fit = functools.partial(self._fitted, moves=moves)
                step = fit_smallest(fit, budget_bytes, record.refused_bytes)
                record.budget_bytes = step.budget_bytes
            elif variant.endswith(" alone"):
                with without_recomputation():
                    step = self._fitted(budget_bytes, moves)
            else:
                step = self._fitted(budget_bytes, moves)
            record.fit_seconds = time.perf_counter() - begin
            way = step.way
            record.moves = moves_of(way)
            record.num_microbatches = way.num_microbatches
            record.num_chunks = getattr(way.made(Chunk), "head_chunks", 1)
            record.predicted_peak_bytes = step.peak_bytes
            record.predicted_seconds = way.seconds
            record.way_digest = way_digest(way)
            is_trained = variant == JOINT and setting in self.case.trained_settings
            twin = None if is_trained else self._twin(record.way_digest)
            if twin is not None:
                record.same_as = f"{twin.setting}, {twin.variant}"
                for name in MEASURED:
                    setattr(record, name, getattr(twin, name))
                return
            self.bench.measure(record, step, self.num_rounds)
            if is_trained:
                self.bench.compare_training(record, step)

        return self._cell(variant, setting, budget_bytes, measure)

    def _fitted(self, budget_bytes: int, moves: tuple[str, ...]) -> packlight.TrainStep:
        options: dict[str, Any] = {}
        if "offload" in moves:
            options["offload_directory"] = self.offload_directory
        bench = self.bench
        bench.begin(is_first=True)
        return packlight.fit(
            bench.built.model, bench.built.loss_fn, bench.optimizer, bench.built.batch,
            budget_bytes, moves=moves, progress=False, **options,
        )

    def _twin(self, digest: str) -> Record | None:
        return next(
            (r for r in self.done.values() if r.way_digest == digest and not r.same_as), None
        )

    def _say(self, what: str) -> None:
        self.progress.update(self.task, description=f"{self.case.name}: {what.strip()}")


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Have everything planned in here with each operation running exactly once."""

    def plan_once(graph: StepGraph, *arguments: Any) -> Plan:
        once = (dataclasses.replace(o, can_recompute=False) for o in graph.computations)
        return plan_whole_step(graph.with_computations(once), *arguments)

    plan_way.plan_whole_step = plan_once
    try:
        yield
    finally:
        plan_way.plan_whole_step = plan_whole_step
