"""Measures the cells of one family and appends each line at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import provenance, root_cause
from benchmarks.zoo.in_pieces import StepInPieces
from benchmarks.zoo.outcome import Outcome, in_words, observe, run_traced
from benchmarks.zoo.records import (
    COMPILE,
    SHARES,
    Cell,
    Config,
    Record,
    append_record,
    read_records,
)
from packlight.backend import PacklightBackend
from packlight.capture.dynamo import plain_errors
from packlight.errors import GraphBreakError, InfeasibleBudgetError
from packlight.moves.precision import under_autocast
from packlight.planner import plan_schedule
from packlight.step import StepGraph
from tests.zoo.families import FAMILIES, make


class NotFiniteError(Exception):
    """The family's own step, in eager PyTorch, gives numbers with which nothing can be compared."""


class NotPlannedError(Exception):
    """The step ran, and Packlight was not asked to plan it."""


def measure_family(
    name: str, cells: list[Cell], out: Path, seed: int, command: str, say: Callable[[str], None]
) -> None:
    """Measure cells of a family; those that fail leave their error.

    Args:
        name: of the family.
        cells: to measure, in order.
        out: where lines are appended.
        seed: of weights and batch.
        command: what the user typed, for the records.
        say: told what runs.
    """
    from benchmarks.zoo.whole_step import measure_fit

    made = provenance(seed, "cpu", command)
    compiled: dict[Config, CompiledStep] = {}
    for cell in cells:
        say(str(cell))
        record = new_record(name, cell, made)
        try:
            if cell.path == COMPILE:
                if cell.config not in compiled:
                    compiled = {cell.config: CompiledStep(name, cell.config, seed)}
                compiled[cell.config].measure(record)
            else:
                measure_fit(record, seed)
        except Exception as error:  # a failure is a result too
            record.error = root_cause(error)
        append_record(out, record)
        step = compiled.get(cell.config)
        if cell.path != COMPILE or step is None or step.in_pieces is None:
            torch._dynamo.reset()  # what was compiled for this cell holds its programs
        gc.collect()


def new_record(name: str, cell: Cell, made: dict[str, Any]) -> Record:
    """Return a cell's line before anything is known."""
    (dropout, precision), path, setting = cell
    kind = FAMILIES[name].kind
    return Record(name, kind, dropout, precision, path, setting, provenance=made)


def cells_to_measure(name: str, cells: list[Cell], out: Path) -> list[Cell]:
    """Return those of a family's cells that a file has no line of."""
    done = {r.cell for r in read_records(out) if r.family == name}
    return [cell for cell in cells if cell not in done]


class CompiledStep:
    """One family's forward and backward under one configuration, through the torch.compile backend.

    Args:
        name: of the family.
        config: dropout and precision.
        seed: of weights and batch.

    Raises:
        NotFiniteError: the eager step does.
    """

    def __init__(self, name: str, config: Config, seed: int) -> None:
        self.model, self.batch, loss_fn = make(name, config.dropout, seed)
        if config.precision != "fp32":
            loss_fn = under_autocast(loss_fn, config.precision, torch.device("cpu"))
        self.loss_fn = loss_fn
        self.eager = finite(observe(self.model, self.batch, self.loss_fn))
        # How it is measured where it is no one graph; None as long as it is one.
        self.in_pieces: StepInPieces | None = None

    @cached_property
    def traced(self) -> tuple[Outcome, bool]:
        """What the traced step without a plan computes; whether PyTorch ran it, or Packlight."""
        return run_traced(
            self.loss_fn, lambda loss_fn: observe(self.model, self.batch, loss_fn),
            lambda outcome: outcome.gradient_error(self.eager),
            fullgraph=self.in_pieces is None,
        )

    def measure(self, record: Record) -> None:
        """Plan for a record's budget, run the step and fill in what it shows."""
        record.draws, record.eager_peak_bytes = self.eager.draws, self.eager.peak_bytes
        mine = self._run(record)
        record.peak_bytes, record.differences = mine.peak_bytes, mine.differences(self.eager)
        if record.differences:
            traced, record.is_traced_by_torch = self.traced
            record.traced_differences = mine.differences(traced)

    def _run(self, record: Record) -> Outcome:
        """Run the step as one graph, or in pieces where it is none."""
        if self.in_pieces is None:
            try:
                return self._run_whole(record)
            except GraphBreakError:
                self.in_pieces = StepInPieces(self.model, self.batch, self.loss_fn)
        return self.in_pieces.measure(record)

    def _run_whole(self, record: Record) -> Outcome:
        begin = time.perf_counter()

        def choose(graph: StepGraph) -> int:
            nonlocal begin
            record.capture_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            budget_bytes = budget_between(graph, SHARES[record.setting])
            plan_schedule(graph, budget_bytes)  # remembered: the backend's own call takes no time
            record.plan_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            return budget_bytes

        torch._dynamo.reset()
        backend = PacklightBackend(choose_budget=choose, rehearse=False, progress=False)
        call = torch.compile(self.loss_fn, backend=backend, fullgraph=True, dynamic=False)
        with plain_errors():
            mine = observe(self.model, self.batch, call)
        if not backend.compilations:
            raise NotPlannedError("the loss was not compiled")
        step, plan = backend.compilations[-1].graph, backend.compilations[-1].plan
        record.budget_bytes, record.predicted_peak_bytes = plan.budget_bytes, plan.peak_bytes
        record.plain_peak_bytes, record.slowdown = plan.plain_peak_bytes, plan.slowdown
        record.num_operations = len(step.operations)
        return mine


def budget_between(graph: StepGraph, share: float) -> int:
    """Return a budget between the smallest feasible one (0.0) and the plain step's peak (1.0).

    The smallest is the one that the error about a budget of one byte names.
    """
    plain_bytes = plan_schedule(graph, None).peak_bytes
    try:
        plan_schedule(graph, 1)
    except InfeasibleBudgetError as error:
        smallest_bytes = error.smallest_bytes
    else:
        raise AssertionError("a step that fits into a byte")
    return smallest_bytes + int(share * (plain_bytes - smallest_bytes))


def finite(outcome: Outcome) -> Outcome:
    """Return an eager step's outcome.

    Raises:
        NotFiniteError: it has no other bits to compare with than NaNs.
    """
    names = outcome.not_finite()
    if names:
        raise NotFiniteError(f"eager PyTorch's {in_words(names)}")
    return outcome
