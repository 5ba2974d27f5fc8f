"""Runs one model's cells: eager, the rivals, and Packlight at the rivals' peaks and below."""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from rich.progress import Progress

import packlight
from benchmarks.common import append_line, innermost, provenance, root_cause
from benchmarks.models import Built
from benchmarks.peers import optimizers
from benchmarks.peers.cases import Case
from benchmarks.peers.compiled import packlight_backend, time_limit
from benchmarks.peers.front import distinct_peaks, front
from benchmarks.peers.ours import ALL_ROW, BACKEND, EXACT_ROW, ROWS, Ours
from benchmarks.peers.records import (
    ABOVE_SMALLEST,
    EAGER,
    FULL,
    HALF,
    SMALLEST,
    Record,
    read_records,
)
from benchmarks.peers.rivals import (
    CHECKPOINT,
    COMPILE_LIMIT_SECONDS,
    EXACT,
    PER_BLOCK,
    SUMS,
    Rival,
    rivals_of,
)
from benchmarks.workbench import (
    Measured,
    Step,
    Workbench,
    fit_smallest,
    smallest_bytes,
    way_digest,
)
from packlight.capture.dynamo import prepare_dynamo
from packlight.errors import InfeasibleBudgetError
from packlight.search.words import moves_of

PACKAGES = ("bitsandbytes", "torchao", "rockmate", "rkgb", "numba")
# So many cells are timed together, each round in another order, with an eager step around them.
CELLS_TOGETHER = 5
# Each takes a plan, and those of the larger models take a minute.
MOST_BUDGETS = 3


@dataclass
class Cell:
    """A cell that is prepared and looked at, and waits for being timed."""

    record: Record
    bench: Workbench
    step: Step
    seconds: list[float] = field(default_factory=list)
    eager_seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


class Bench:
    """All cells of one model.

    Args:
        case: which model.
        out: where lines are appended; cells that it holds are not measured again.
        quick: small sizes, few settings.
        num_rounds: how often each cell is timed.
        seed: of model, batch, dropout and the order within rounds.
        command: what the user typed, for the records.
        progress: shows what runs.
        directory: where Packlight may offload to, in the rows that use a disk.
    """

    def __init__(
        self, case: Case, out: Path, quick: bool, num_rounds: int, device: str, seed: int,
        command: str, progress: Progress, directory: Path,
    ) -> None:
        self.case, self.out, self.quick, self.num_rounds = case, out, quick, num_rounds
        self.device, self.seed, self.progress, self.directory = device, seed, progress, directory
        self.title = title_of(case, quick)
        self.provenance = provenance(seed, device, command, PACKAGES)
        known = [r for r in read_records(out) if (r.model, r.title) == (case.name, self.title)]
        self.done = {r.key: r for r in known}
        self.built: Built = case.build(quick, device, seed)
        prepare_dynamo()  # rivals trace through what Packlight traces through
        self.benches: dict[tuple[str, bool, bool], Workbench] = {}
        self.main = self._bench(optimizers.TORCH)
        self.waiting: list[Cell] = []
        self.shuffler = random.Random(seed)
        self.task = progress.add_task(case.name, total=None)

    def run(self, apart: bool = False) -> int:
        """Measure what is lacking; return how many lines were added.

        Args:
            apart: the rivals that run in an environment of their own, and nothing else.
        """
        num_known = len(self.done)
        rivals = rivals_of(self.case, self.quick, self.built)
        if not apart:
            self._eager()
        for rival in rivals:
            if rival.is_apart == apart:
                self._rival(rival)
        self._time_waiting()
        if not apart:
            self._packlight()
            self._time_waiting()
        self.progress.remove_task(self.task)
        return len(self.done) - num_known

    # -- cells

    def _eager(self) -> None:
        def measure(record: Record) -> None:
            step = self.main.eager_step(self.built.loss_fn)
            self.main.look_at(record, step)
            self.main.time_beside_eager(record, step, self.num_rounds, self.say)

        record = self._cell(Record(self.case.name, self.title, EAGER, changes=EXACT), measure)
        if record.peak_bytes is None:
            raise RuntimeError(f"{self.case.name}: the eager step failed: {record.error}")

    def _rival(self, rival: Rival) -> None:
        def measure(record: Record) -> Cell:
            begin = time.perf_counter()
            bench, step = self.prepared_rival(rival)
            if rival.is_compiled or rival.is_apart:
                record.prepare_seconds = time.perf_counter() - begin
            bench.look_at(record, step, self.main.reference)
            return Cell(record, bench, step)

        self._cell(
            Record(self.case.name, self.title, rival.tool, rival.setting, rival.changes), measure
        )

    def prepared_rival(self, rival: Rival) -> tuple[Workbench, Step]:
        """Return a rival's step; what is compiled has run once."""
        bench = self._bench(rival.optimizer)
        bench.begin(is_first=True)
        if not (rival.is_compiled or rival.is_apart):
            return bench, rival.run(bench, rival.prepare(bench.built))
        with time_limit(COMPILE_LIMIT_SECONDS):
            step = rival.run(bench, rival.prepare(bench.built))
            step(bench.built.batch)
        return bench, step

    def _packlight(self) -> None:
        rivals = [r for r in self.done.values() if not r.is_ours]
        for row in ROWS:
            # A trial run has one budget for each row, and looks for the smallest once.
            kinds = row.against or ((EXACT, SUMS) if self.quick else ())
            against = front(r for r in rivals if r.changes in kinds)
            peaks = distinct_peaks(against, 1 if self.quick else MOST_BUDGETS)
            budgets = {f"at the peak of {r.name}": r.peak_bytes or 0 for r in peaks}
            if row is EXACT_ROW:
                eager_bytes = self.done[EAGER, ""].peak_bytes or 0
                budgets |= {FULL: eager_bytes, HALF: eager_bytes // 2}
            for setting, budget_bytes in budgets.items():
                record = self._fit(row, setting, budget_bytes)
                if row is EXACT_ROW and record.smallest_bytes is not None:
                    self._fit(ALL_ROW, setting, budget_bytes)
            if row.has_smallest and (row is EXACT_ROW or not self.quick):
                smallest = self._fit(row, SMALLEST, None)
                has_more = row in (EXACT_ROW, ALL_ROW) and not self.quick
                if has_more and smallest.budget_bytes is not None and not smallest.error:
                    self._fit(row, ABOVE_SMALLEST, smallest.budget_bytes * 11 // 10)
        per_block = self.done.get((CHECKPOINT, PER_BLOCK))
        if per_block is not None and per_block.peak_bytes is not None:
            self._backend(f"at the peak of {per_block.name}", per_block.peak_bytes)

    def _fit(self, row: Ours, setting: str, budget_bytes: int | None) -> Record:
        """Return the cell of one row at a budget, or in as little as it takes if that is None."""

        def measure(record: Record) -> Cell | None:
            bench = self._bench_of(row)
            fit = functools.partial(self.fitted, row)
            begin = time.perf_counter()
            if budget_bytes is None:
                record.budget_bytes = smallest_bytes(fit)
                step = fit_smallest(fit, record.budget_bytes, record.refused_bytes)
                record.budget_bytes = step.budget_bytes
            else:
                step = fit(budget_bytes)
            record.prepare_seconds = time.perf_counter() - begin
            record.moves = moves_of(step.way)
            record.predicted_peak_bytes = step.peak_bytes
            record.predicted_seconds = step.way.seconds
            context = (row.optimizer, row.in_bf16, row.has_disk, row.allow)
            record.way_digest = f"{way_digest(step.way)} {context}"
            if self._is_copied(record):
                return None
            bench.look_at(record, step, self.main.reference)
            return Cell(record, bench, step)

        changes = ", ".join(row.changes)
        return self._cell(
            Record(
                self.case.name, self.title, row.tool, setting, changes, True,
                budget_bytes=budget_bytes,
            ),
            measure,
        )

    def prepared_ours(self, record: Record) -> tuple[Workbench, Step]:
        """Return the step that a record of Packlight's is about."""
        assert record.budget_bytes is not None
        if record.tool == BACKEND:
            step = self._backend_step(self._backend_budget(record.budget_bytes))
            step(self.built.batch)
            return self.main, step
        row = next(row for row in ROWS if row.tool == record.tool)
        return self._bench_of(row), self.fitted(row, record.budget_bytes)

    def fitted(self, row: Ours, budget_bytes: int) -> packlight.TrainStep:
        """Return the step that one of Packlight's rows has for a budget."""
        bench = self._bench_of(row)
        bench.begin(is_first=True)
        built = bench.built
        return packlight.fit(
            built.model, built.loss_fn, bench.optimizer, built.batch, budget_bytes,
            moves=row.moves, allow=row.allow, progress=False,
            offload_directory=self.directory if row.has_disk else None,
        )

    def _is_copied(self, record: Record) -> bool:
        """Take what another cell with the same schedules showed; return whether there is one."""
        if any(c.record.way_digest == record.way_digest for c in self.waiting):
            self._time_waiting()
        twin = next(
            (r for r in self.done.values() if r.way_digest == record.way_digest and r.was_timed),
            None,
        )
        if twin is None:
            return False
        record.same_as = twin.same_as or twin.name
        for name in fields(Measured):
            setattr(record, name.name, getattr(twin, name.name))
        return True

    def _backend(self, setting: str, peak_bytes: int) -> None:
        """Measure Packlight's backend, as much as possible in the bytes of a peak."""

        def measure(record: Record) -> Cell:
            budget_bytes = self._backend_budget(peak_bytes)
            begin = time.perf_counter()
            step = self._backend_step(budget_bytes)
            try:
                step(self.built.batch)
            except Exception as error:
                if isinstance(cause := innermost(error), InfeasibleBudgetError):
                    record.smallest_bytes = peak_bytes - budget_bytes + cause.smallest_bytes
                raise
            record.prepare_seconds = time.perf_counter() - begin
            self.main.look_at(record, step)
            return Cell(record, self.main, step)

        self._cell(
            Record(
                self.case.name, self.title, BACKEND, setting, EXACT, True, budget_bytes=peak_bytes
            ),
            measure,
        )

    def _backend_budget(self, peak_bytes: int) -> int:
        """Return what a peak leaves above what is there between steps."""
        self.main.begin(is_first=True)
        self.main.eager_step(self.built.loss_fn)(self.built.batch)  # makes optimizer state
        self.main.begin()
        return peak_bytes - self.main.resident_bytes()

    def _backend_step(self, budget_bytes: int) -> Step:
        return self.main.eager_step(packlight_backend(self.built, budget_bytes))

    def _cell(self, record: Record, measure: Callable[[Record], Cell | None]) -> Record:
        """Return a cell's record: the known one, or a new one, which may have to wait for times."""
        if record.key in self.done:
            return self.done[record.key]
        record.parameter_bytes = sum(p.nbytes for p in self.main.parameters)
        record.provenance = self.provenance
        self.say(record.name)
        begin = time.perf_counter()
        cell = None
        try:
            cell = measure(record)
        except InfeasibleBudgetError as error:
            record.error, record.smallest_bytes = root_cause(error), error.smallest_bytes
        except Exception as error:  # a failure is a result too
            record.error = root_cause(error)  # what a compiler wraps keeps what was noted
        record.cell_seconds = time.perf_counter() - begin
        if cell is None:
            self._note(record)
        else:
            self.waiting.append(cell)
            if len(self.waiting) == CELLS_TOGETHER:
                self._time_waiting()
        return record

    def _note(self, record: Record) -> None:
        append_line(self.out, record)
        self.done[record.key] = record

    def _bench_of(self, row: Ours) -> Workbench:
        return self._bench(row.optimizer, row.in_bf16, row.has_disk)

    def _bench(self, choice: str, in_bf16: bool = False, is_alone: bool = False) -> Workbench:
        """Return the bench with an optimizer; a copy of the model where it is changed for good."""
        key = (choice, in_bf16, is_alone)
        if key not in self.benches:
            built = self.built
            if in_bf16 or is_alone:
                built = built.another(in_bf16=in_bf16)
            made = optimizers.make_optimizers(choice, self.case.optimizer, built.model)
            self.benches[key] = Workbench(built, made, self.device, self.seed)
        return self.benches[key]

    # -- rounds

    def _time_waiting(self) -> None:
        """Time the waiting cells together and write their lines."""
        begin = time.perf_counter()
        cells, self.waiting = self.waiting, []
        eager = self.main.eager_step(self.built.loss_fn)
        for round_index in range(self.num_rounds if cells else 0):
            before = self.main.timed_step(eager)
            taken: list[tuple[Cell, float]] = []
            for cell in self.shuffler.sample(cells, len(cells)):
                self.say(f"round {round_index + 1}: {cell.record.name}")
                taken.append((cell, cell.bench.timed_step(cell.step)))
            after = self.main.timed_step(eager)
            for cell, seconds in taken:
                cell.seconds.append(seconds)
                cell.eager_seconds += [before, after]
                cell.ratios.append(seconds / ((before + after) / 2))
        for cell in cells:
            cell.record.set_times(cell.seconds, cell.eager_seconds, cell.ratios)
            cell.record.cell_seconds += (time.perf_counter() - begin) / len(cells)
            self._note(cell.record)
        cells.clear()
        torch._dynamo.reset()  # what was compiled for these cells holds their programs
        gc.collect()

    def say(self, what: str) -> None:
        """Show what runs."""
        self.progress.update(self.task, description=f"{self.case.name}: {what}")


def title_of(case: Case, quick: bool) -> str:
    """Return what the tables call a case."""
    return f"small trial instead of {case.title}" if quick else case.title
