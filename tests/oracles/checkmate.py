"""The fastest schedule of a small step within a budget, and the smallest peak: exact, by a MILP.

Checkmate (Jain et al., MLSys 2020, section 4): stage t ends with the first run of operation t and
may, before it, run any earlier operation again in the order of the graph.

    R[t, k]     1 if operation k runs in stage t;   R[t, t] = 1
    S[t, b]     1 if buffer b is in memory when stage t begins
    U[t, k]     bytes in memory while operation k runs in stage t, at most the budget
    FREE        a buffer leaves right after its last use

Here the paper's S and FREE are one family, L[t, b, j]: is buffer b held in stage t before its j-th
event, where the events of b are its creator and its readers up to t, and the last j is "until the
stage ends". L can only rise at the creator:

    L[t, b, 1]     <= L[t, b, 0] + R[t, creator]        L[t, b, j+1] <= L[t, b, j]
    L[t+1, b, 0]   <= L[t, b, last]                     R[t, k]      <= L[t, b, before k], k reads b
    U[t, k]         = sum of bytes[b] L[t, b, at k] over buffers that k does not create
                      + R[t, k] (bytes that k creates + its workspace) - overwritten bytes

So "freed" needs no variable and no product of variables, U is linear, and only R must be declared
integer: with R fixed, the least L is integral. Differences from the paper: buffers instead of
operations are kept (an operation may create several, with lifetimes of their own), inputs count
while an operation runs, operations have workspace, an operation may take over the storage of a
buffer that it reads for the last time (O[t, k, pair] <= R[t, k], <= 1 - L of the read buffer after
k), outputs must be in memory when the forward or the step ends.

Like the paper's, the optimum is one over schedules whose first runs follow the order of the graph;
a planner that reorders operations may beat it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from packlight.step import Schedule, StepGraph
from tests.oracles.liveness import schedule_from_order


class Status(StrEnum):
    """What the solver proved."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answer:
    """What the MILP found.

    Attributes:
        status: OPTIMAL only if the solver closed the gap.
        seconds: duration of the schedule by the MILP's own count, infinity without a schedule.
        peak_bytes: an upper bound on the schedule's peak, tight if the peak was minimised.
        schedule: None without a schedule.
        solve_seconds: what it took.
    """

    status: Status
    seconds: float
    peak_bytes: int
    schedule: Schedule | None
    solve_seconds: float


@dataclass
class _Rows:
    """Rows `sum(coefficient * variable) <= bound`, collected one by one."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)

    def add(self, terms: list[tuple[int, float]], bound: float) -> None:
        row = len(self.bounds)
        self.entries += [(row, variable, coefficient) for variable, coefficient in terms]
        self.bounds.append(bound)

    def constraint(self, num_variables: int) -> LinearConstraint:
        rows, columns, values = zip(*self.entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.bounds), num_variables))
        return LinearConstraint(matrix, -np.inf, np.asarray(self.bounds))


class _Model:
    """Variables and rows of one graph; the objective and the budget are added by the callers."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.integral: list[int] = []
        self.rows = _Rows()
        self.num_operations = len(graph.operations)
        self.resident = {b.id for b in graph.buffers if b.kind.is_resident}
        self.creator = {b: op.id for op in graph.operations for b in op.creates}
        self.readers: dict[int, list[int]] = {b: [] for b in self.creator}
        for op in graph.operations:
            for b in dict.fromkeys(op.reads):
                if b not in self.resident:
                    self.readers[b].append(op.id)
        # Whole numbers as small as they get keep the solver's tolerances harmless.
        sizes = [b.bytes for b in graph.buffers if b.id not in self.resident]
        sizes += [op.workspace_bytes for op in graph.operations]
        self.unit_bytes = math.gcd(*sizes) or 1
        # Pinned from the first creation on: what the forward hands out and the step keeps.
        self.pinned = set(graph.forward_outputs) & set(graph.outputs) & set(self.creator)
        self.runs: dict[tuple[int, int], int] = {}
        self.holds: dict[tuple[int, int, int], int] = {}
        self.peak = self._variable(0, np.inf)
        self._add_runs()
        self._add_holds()
        self._add_memory()

    def _variable(self, lower: float, upper: float, integral: bool = False) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.integral.append(int(integral))
        return len(self.lower) - 1

    def _units(self, num_bytes: int) -> int:
        return num_bytes // self.unit_bytes

    def _add_runs(self) -> None:
        for stage in range(self.num_operations):
            for op in self.graph.operations[: stage + 1]:
                again = op.can_recompute and bool(op.creates) and not self.pinned & set(op.creates)
                first = op.id == stage
                self.runs[stage, op.id] = self._variable(first, first or again, integral=True)

    def _events(self, stage: int, buffer: int) -> list[int]:
        return [self.creator[buffer], *(r for r in self.readers[buffer] if r <= stage)]

    def _held_at(self, stage: int, buffer: int, op: int) -> int:
        """Return the variable that says whether the buffer is held just before `op` runs."""
        earlier = sum(event < op for event in self._events(stage, buffer))
        return self.holds[stage, buffer, earlier]

    def _add_holds(self) -> None:
        rows, runs, holds = self.rows, self.runs, self.holds
        for stage in range(self.num_operations):
            for b, creator in self.creator.items():
                if creator > stage:
                    continue
                events = self._events(stage, b)
                for j in range(len(events) + 1):
                    must = b in self.pinned and (creator < stage or j > 0)
                    if j == len(events):
                        must |= stage == self.num_operations - 1 and b in self.graph.outputs
                        at_forward_end = stage == self.graph.num_forward - 1
                        must |= at_forward_end and b in self.graph.forward_outputs
                    may = creator < stage or j > 0
                    holds[stage, b, j] = self._variable(must, may)
                for j, event in enumerate(events):
                    rise = [(runs[stage, creator], -1.0)] if j == 0 else []
                    rows.add([(holds[stage, b, j + 1], 1), (holds[stage, b, j], -1), *rise], 0)
                    if j > 0:
                        rows.add([(runs[stage, event], 1), (holds[stage, b, j], -1)], 0)
                if creator < stage:
                    last = len(self._events(stage - 1, b))
                    rows.add([(holds[stage, b, 0], 1), (holds[stage - 1, b, last], -1)], 0)
        self._add_cuts()

    def _add_cuts(self) -> None:
        """Exclude schedules that only waste time; they would loosen the relaxation."""
        for (stage, op), run in self.runs.items():
            creates = self.graph.operations[op].creates
            if op == stage or not creates:
                continue
            kept = [(self.holds[stage, b, 1], -1.0) for b in creates]
            self.rows.add([(run, 1), *kept], 0)
            if len(creates) == 1:
                self.rows.add([(run, 1), (self.holds[stage, creates[0], 0], 1)], 1)

    def _add_memory(self) -> None:
        graph, rows = self.graph, self.rows
        for (stage, op), run in self.runs.items():
            operation = graph.operations[op]
            made = sum(graph.buffers[b].bytes for b in operation.creates)
            terms = [(run, float(self._units(made + operation.workspace_bytes)))]
            for b, creator in self.creator.items():
                if creator <= stage and b not in operation.creates:
                    size = float(self._units(graph.buffers[b].bytes))
                    terms.append((self._held_at(stage, b, op), size))
            taken_over = []
            for created, read in operation.overwrites:
                if read in self.resident:
                    continue
                take = self._variable(0, 1)
                taken_over.append((take, 1.0))
                after = self.holds[stage, read, self._events(stage, read).index(op) + 1]
                rows.add([(take, 1), (after, 1)], 1)
                terms.append((take, -float(self._units(graph.buffers[created].bytes))))
            if taken_over:
                rows.add([*taken_over, (run, -1)], 0)
            rows.add([*terms, (self.peak, -1)], 0)

    def solve(self, objective: np.ndarray, time_limit_seconds: float) -> Answer:
        started = time.perf_counter()
        result = milp(
            objective,
            integrality=np.asarray(self.integral),
            bounds=Bounds(np.asarray(self.lower, float), np.asarray(self.upper, float)),
            constraints=self.rows.constraint(len(self.lower)),
            options={"time_limit": time_limit_seconds, "mip_rel_gap": 1e-6},
        )
        solve_seconds = time.perf_counter() - started
        if result.x is None:
            status = Status.INFEASIBLE if result.status == 2 else Status.UNKNOWN
            return Answer(status, math.inf, 0, None, solve_seconds)
        ran = {key for key, variable in self.runs.items() if result.x[variable] > 0.5}
        order = sorted(ran)
        seconds = sum(self.graph.operations[op].seconds for _, op in order)
        num_forward = sum(stage < self.graph.num_forward for stage, _ in order)
        return Answer(
            status=Status.OPTIMAL if result.status == 0 else Status.FEASIBLE,
            seconds=seconds,
            peak_bytes=round(result.x[self.peak]) * self.unit_bytes,
            schedule=schedule_from_order(self.graph, [op for _, op in order], num_forward),
            solve_seconds=solve_seconds,
        )


def fastest_schedule(
    graph: StepGraph, budget_bytes: int, time_limit_seconds: float = 120.0
) -> Answer:
    """Return the fastest schedule whose peak is at most the budget."""
    model = _Model(graph)
    model.upper[model.peak] = budget_bytes // model.unit_bytes
    objective = np.zeros(len(model.lower))
    scale = graph.seconds / len(graph.operations) or 1.0
    for (_, op), run in model.runs.items():
        objective[run] = graph.operations[op].seconds / scale
    return model.solve(objective, time_limit_seconds)


def smallest_peak(graph: StepGraph, time_limit_seconds: float = 120.0) -> Answer:
    """Return a schedule with the smallest peak there is; its seconds are not minimised."""
    model = _Model(graph)
    objective = np.zeros(len(model.lower))
    objective[model.peak] = 1.0
    return model.solve(objective, time_limit_seconds)
