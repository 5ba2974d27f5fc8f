"""Runs one model's cells: peaks first, then rounds in which each takes its turn beside eager."""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
from rich.progress import Progress

import packlight.runtime.backend
from benchmarks.common import (
    provenance,
    quartiles,
    relative_error,
    root_cause,
    same_bits,
    timed,
)
from benchmarks.models import Built, LossFn
from benchmarks.peers.compiled import distinct, time_limit
from benchmarks.spine.cases import Case
from benchmarks.spine.peers import EAGER, Peer, peers_of
from benchmarks.spine.records import Record
from packlight.capture.peak import measure_peak
from packlight.planner import Planner, plan_schedule, smallest_plan
from packlight.runtime.backend import PacklightBackend
from packlight.runtime.dynamo import prepare_dynamo
from packlight.step import Plan, Schedule, StepGraph

PACKLIGHT = "packlight"
UNPLANNED = "unplanned"
SMALLEST = "smallest feasible"
HALF = "50% of eager"
# Eager runs again after so many cells; each cell is compared with the eager steps around it.
CELLS_BETWEEN_EAGER = 5
NO_LIMIT_SECONDS = 3600.0


@dataclass
class Cell:
    """One row of the table while it is being measured."""

    record: Record
    loss_fn: LossFn
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Reference:
    """What eager PyTorch computes in one step."""

    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    buffers: list[torch.Tensor]


class Bench:
    """All cells of one model.

    Args:
        case: which model.
        quick: small sizes.
        num_rounds: how often each cell is timed.
        seed: of model, batch, dropout and the order within rounds.
        command: what the user typed, for the records.
        progress: shows what runs.
    """

    def __init__(
        self, case: Case, quick: bool, num_rounds: int, device: str, seed: int, command: str,
        progress: Progress,
    ) -> None:
        self.case, self.num_rounds, self.seed, self.progress = case, num_rounds, seed, progress
        self.title = f"small trial instead of {case.title}" if quick else case.title
        self.device = torch.device(device)
        self.provenance = provenance(seed, device, command)
        self.built: Built = case.build(quick, device, seed)
        prepare_dynamo()  # peers trace through what Packlight traces through
        self.eager = Cell(self._record(EAGER, ""), self.built.loss_fn)
        self.cells: list[Cell] = []
        self.aliases: list[tuple[Record, Cell]] = []
        self.graph: StepGraph | None = None
        self.task = progress.add_task(case.name, total=None)

    def run(self) -> list[Record]:
        """Return one record per cell."""
        self._say("eager")
        self._step(self.eager.loss_fn)
        self.reference = self._measure(self.eager)
        for peer in peers_of(self.case):
            self._add_peer(peer)
        self._add_packlight()
        self._time_rounds()
        cells = [self.eager, *self.cells]
        for cell in cells:
            _summarize(cell)
        for record, cell in self.aliases:
            measured = cell.record
            record.ratio_median, record.ratio_quartiles, record.num_rounds = (
                measured.ratio_median, measured.ratio_quartiles, measured.num_rounds,
            )
            record.seconds_median = measured.seconds_median
        records = [c.record for c in cells] + [record for record, _ in self.aliases]
        self.progress.remove_task(self.task)
        return records

    # -- cells

    def _add_peer(self, peer: Peer) -> None:
        self._say(f"{peer.tool}, {peer.setting}")
        cell = Cell(self._record(peer.tool, peer.setting), self.built.loss_fn)
        self.cells.append(cell)
        try:
            cell.loss_fn = peer.prepare(self.built)
            if peer.is_compiled:
                begin = time.perf_counter()
                with time_limit(peer.compile_limit_seconds or NO_LIMIT_SECONDS):
                    self._step(cell.loss_fn)
                cell.record.compile_seconds = time.perf_counter() - begin
            self._measure(cell)
        except Exception as error:  # a peer that fails is a result too
            cell.record.error = f"{type(error).__name__}: {error}".strip()[:500]

    def _add_packlight(self) -> None:
        rivals = [c.record for c in self.cells if c.record.peak_bytes is not None]
        self._add_plan(UNPLANNED, lambda graph: None)
        eager_peak = self.eager.record.peak_bytes
        assert eager_peak is not None
        for rival in rivals:
            self._add_plan(
                f"at the peak of {rival.name}", _constant(rival.peak_bytes), rival=rival.name
            )
        for budget in self.case.budgets_bytes:
            self._add_plan(f"{budget / 2**20:g} MiB", _constant(budget))
        self._add_plan(HALF, _constant(eager_peak // 2), watch_memory=True)
        self._add_plan(SMALLEST, lambda graph: smallest_plan(graph).peak_bytes)

    def _add_plan(
        self,
        setting: str,
        choose_budget: Callable[[StepGraph], int | None],
        rival: str | None = None,
        watch_memory: bool = False,
    ) -> None:
        self._say(f"{PACKLIGHT}, {setting}")
        record = self._record(PACKLIGHT, setting)
        record.rival = rival
        seconds: list[float] = []

        def timed_plan(graph: StepGraph, budget_bytes: int | None) -> Plan:
            record.budget_bytes = budget_bytes
            begin = time.perf_counter()
            try:
                return plan_schedule(graph, budget_bytes)
            finally:
                seconds.append(time.perf_counter() - begin)

        backend = PacklightBackend(progress=False, choose_budget=choose_budget)
        cell = Cell(record, self.built.loss_fn)
        try:
            cell.loss_fn = torch.compile(
                distinct(self.built.loss_fn, f"packlight_{setting}"), backend=backend,
                fullgraph=True, dynamic=False,
            )
            begin = time.perf_counter()
            with mock.patch.object(packlight.runtime.backend, "plan_schedule", timed_plan):
                self._step(cell.loss_fn)
            record.compile_seconds = time.perf_counter() - begin
            record.plan_seconds = seconds[-1]  # an earlier one was for times not yet rehearsed
            compilation = backend.compilations[-1]
            plan, cell.schedule = compilation.plan, compilation.plan.schedule
            record.predicted_peak_bytes = plan.peak_bytes
            record.predicted_slowdown = plan.slowdown
            record.num_operations = len(compilation.graph.operations)
            if watch_memory:
                record.planner_bytes = _planner_bytes(compilation.graph, record.budget_bytes)
            self._measure(cell)
        except Exception as error:
            record.error = root_cause(error)
        twin = next(
            (c for c in self.cells if c.schedule is not None and c.schedule == cell.schedule), None
        )
        if twin is None or record.error is not None:
            self.cells.append(cell)
        else:  # the same schedule: timed once
            record.same_as = twin.record.name
            self.aliases.append((record, twin))

    def _record(self, tool: str, setting: str) -> Record:
        return Record(self.case.name, self.title, tool, setting, provenance=self.provenance)

    # -- one step

    def _begin(self) -> None:
        """Set weights, statistics and generators to where the first step found them."""
        self.built.model.load_state_dict(self.built.initial)
        self.built.model.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed + 1)

    def _run(self, loss_fn: LossFn) -> torch.Tensor:
        loss = loss_fn(self.built.model, self.built.batch)
        loss.backward()
        return loss.detach()

    def _step(self, loss_fn: LossFn) -> torch.Tensor:
        self._begin()
        return self._run(loss_fn)

    def _measure(self, cell: Cell) -> Reference:
        """Measure a cell's peak and compare what it computes with eager."""
        self._begin()
        peak = measure_peak(lambda: self._run(cell.loss_fn), self.device)
        cell.record.peak_bytes = peak.peak_bytes
        model = self.built.model
        gradients = [None if p.grad is None else p.grad for p in model.parameters()]
        if cell is self.eager:
            return Reference(
                peak.result,
                [None if g is None else g.clone() for g in gradients],
                [b.clone() for b in model.buffers()],
            )
        cell.record.same_bits = {
            "loss": same_bits(self.reference.loss, peak.result),
            "gradients": all(map(same_bits, self.reference.gradients, gradients)),
            "buffers": all(map(same_bits, self.reference.buffers, model.buffers())),
        }
        cell.record.gradient_error = relative_error(self.reference.gradients, gradients)
        return self.reference

    def _timed_step(self, loss_fn: LossFn) -> float:
        self._begin()
        return timed(lambda: self._run(loss_fn), self.device)

    # -- rounds

    def _time_rounds(self) -> None:
        cells = [c for c in self.cells if c.record.error is None]
        shuffler = random.Random(self.seed)
        self.progress.update(self.task, total=self.num_rounds * len(cells), completed=0)
        for round_index in range(self.num_rounds):
            self._say(f"round {round_index + 1} of {self.num_rounds}")
            order = shuffler.sample(cells, len(cells))
            before = self._time_eager()
            for start in range(0, len(order), CELLS_BETWEEN_EAGER):
                group = order[start : start + CELLS_BETWEEN_EAGER]
                seconds = []
                for cell in group:
                    seconds.append(self._timed_step(cell.loss_fn))
                    self.progress.advance(self.task)
                after = self._time_eager()
                for cell, taken in zip(group, seconds, strict=True):
                    cell.seconds.append(taken)
                    cell.ratios.append(taken / ((before + after) / 2))
                before = after

    def _time_eager(self) -> float:
        taken = self._timed_step(self.eager.loss_fn)
        if self.eager.seconds:
            # Of two eager steps in a row the later over their mean: how quiet the machine is.
            self.eager.ratios.append(2 * taken / (taken + self.eager.seconds[-1]))
        self.eager.seconds.append(taken)
        return taken

    def _say(self, what: str) -> None:
        self.progress.update(self.task, description=f"{self.case.name}: {what}")


def _constant(budget_bytes: int | None) -> Callable[[StepGraph], int | None]:
    return lambda graph: budget_bytes


def _summarize(cell: Cell) -> None:
    if not cell.seconds:
        return
    record = cell.record
    record.num_rounds = len(cell.ratios)
    record.seconds_median = statistics.median(cell.seconds)
    record.ratio_median = statistics.median(cell.ratios)
    record.ratio_quartiles = quartiles(cell.ratios)


def _planner_bytes(graph: StepGraph, budget_bytes: int | None) -> int:
    tracemalloc.start()
    try:
        Planner(graph).plan(budget_bytes)  # a planner of its own: others remember their plans
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
