"""From a step and a budget to a plan, and the memory of what was found before.

Small steps are searched exactly, larger ones by a dynamic program and local moves. Every schedule
found is remembered: the answer is always the fastest known one that fits, so that within a planner
a larger budget never gets a slower plan than a smaller one planned before it. Two planners that are
asked the same questions in the same order give the same answers.

With transfers in the graph, what was found without them is where the search with them starts
(`offload.py`), and is remembered, too: transfers never make a plan slower or larger.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from packlight.planner.bound import lower_bound_seconds
from packlight.planner.exact import ExactSearch
from packlight.planner.explain import infeasible_budget
from packlight.planner.offload import OffloadSearch
from packlight.planner.plain import plain_schedule
from packlight.planner.search import Found, LocalSearch, schedule_of
from packlight.step import Machine, Plan, PlanStatus, Schedule, StepGraph, simulate

MAX_EXACT = 64
FEW_NODES, MANY_NODES = 20_000, 200_000
CLOSE = 1.002
# Of steps planned before, some schedules; of many more the smallest, which an error may have named.
NUM_REMEMBERED_STEPS, NUM_REMEMBERED_SCHEDULES, NUM_REMEMBERED_SMALLEST = 8, 6, 64
STREAMING_SHARES = (0.9, 0.6, 0.4)


class Planner:
    """Plans one graph for any number of budgets; segments and options are found once.

    Attributes:
        graph: the step.
        machine: with the lanes of its transfers, if it has some.
        plain: the schedule without recomputation. What rests in another memory, it reads once and
            keeps.
        plain_peak_bytes: its peak.
        plain_seconds: its duration; where something rests elsewhere, without waiting for it.
    """

    def __init__(
        self, graph: StepGraph, machine: Machine | None = None, without: Planner | None = None
    ) -> None:
        """Prepare planning.

        Args:
            graph: the step.
            machine: with the lanes of its transfers, if it has some.
            without: a planner of the same graph without transfers, to go on from what it found; by
                default a new one.
        """
        self.graph, self.machine = graph, machine
        self._transfers: OffloadSearch | None = None
        self._without: Planner | None = None
        self._exact: ExactSearch | None = None
        if graph.transfers:
            names = {lane.name for lane in machine.lanes} if machine is not None else set()
            missing = {o.lane for o in graph.transfers} - names
            if machine is None or missing:
                raise ValueError(
                    f"a graph with transfers on {', '.join(sorted(missing))} needs the machine "
                    "that they were made for\nhint: pass it, or graph.without_transfers()"
                )
            self._without = without or Planner(graph.without_transfers())
            if graph.resting and without is None:
                # What it finds is a start for something else: it need not be the optimum.
                self._without._exact = None
            self._transfers = OffloadSearch(graph, machine, lambda: self.local.views)
        if graph.resting:
            assert self._transfers is not None
            first = self._transfers.plain()
            self.plain, self.plain_peak_bytes = first.schedule, first.peak_bytes
            self.plain_seconds = graph.seconds
        else:
            self.plain = plain_schedule(graph)
            timeline = simulate(graph, self.plain)
            self.plain_peak_bytes, self.plain_seconds = timeline.peak_bytes, timeline.seconds
            first = Found(self.plain, timeline.seconds, timeline.peak_bytes)
        self._found = [first]
        self._bounds: dict[int, float] = {}
        self._proven: dict[int, float] = {}
        self._local: LocalSearch | None = None
        if len(graph.operations) <= MAX_EXACT and self._transfers is None:
            self._exact = ExactSearch(graph)
        self._smallest_was_sought = False
        self._impossible_bytes = least_peak_bytes(graph) - 1

    @property
    def local(self) -> LocalSearch:
        """The search by segments and local moves, set up when first needed."""
        if self._without is not None:
            return self._without.local
        if self._local is None:
            self._local = LocalSearch(self.graph)
        return self._local

    def plan(self, budget_bytes: int | None) -> Plan:
        """Return the fastest plan known within a budget, after looking for one.

        Raises:
            InfeasibleBudgetError: nothing was found that fits; names the smallest budget that does.
        """
        limit = self.plain_peak_bytes if budget_bytes is None else budget_bytes
        # Where nothing rests elsewhere, nothing is faster than the plain step.
        is_open = limit < self.plain_peak_bytes or bool(self.graph.resting)
        if limit not in self._bounds and limit > self._impossible_bytes and is_open:
            self._solve(limit)
        best = self._fastest_within(limit)
        if best is None:
            smallest = self.smallest()
            if smallest.peak_bytes > limit:
                raise infeasible_budget(self.graph, limit, smallest.schedule, self.machine)
            best = self._fastest_within(limit) or smallest
        return self._as_plan(best, budget_bytes)

    def smallest_plan(self) -> Plan:
        """Return the plan with the smallest peak found, as fast as one is known there."""
        return self.plan(self.smallest().peak_bytes)

    def smallest(self) -> Found:
        """Return the schedule with the smallest peak found."""
        if not self._smallest_was_sought:
            self._smallest_was_sought = True
            if self._transfers is not None:
                self._found.extend(self._transfers.smallest())
                if self._without is not None and not self.graph.resting:
                    self._found.append(self._without.smallest())
            else:
                self._found.extend(self.local.smallest(self.plain_peak_bytes))
            if self._exact is not None:
                self._shrink(self._exact)
            self._forget_beaten()
        return min(self._found, key=lambda f: (f.peak_bytes, f.seconds))

    def know(self, schedules: Iterable[Schedule]) -> None:
        """Take schedules found for the same operations with other times."""
        for schedule in schedules:
            timeline = simulate(self.graph, schedule, self.machine)
            self._found.append(Found(schedule, timeline.seconds, timeline.peak_bytes))
        self._forget_beaten()

    def some_schedules(self, count: int) -> list[Schedule]:
        """Return some of the schedules found, the one with the smallest peak among them."""
        stride = max(1, -(-len(self._found) // count))
        return [f.schedule for f in sorted(self._found, key=lambda f: f.peak_bytes)[::stride]]

    def _fastest_within(self, budget_bytes: int) -> Found | None:
        fitting = [f for f in self._found if f.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda f: (f.seconds, f.peak_bytes), default=None)

    def _forget_beaten(self) -> None:
        """Keep only schedules that no other beats in both seconds and peak."""
        front: list[Found] = []
        for found in sorted(self._found, key=lambda f: (f.peak_bytes, f.seconds)):
            if not front or found.seconds < front[-1].seconds:
                front.append(found)
        self._found = front

    # -- search

    def _solve(self, budget_bytes: int) -> None:
        self._bounds[budget_bytes] = lower_bound_seconds(self.graph, budget_bytes)
        if self._transfers is not None:
            self._solve_with_transfers(self._transfers, budget_bytes)
        elif self._exact is None:
            self._found.extend(self.local.fastest(budget_bytes))
        else:
            self._solve_exactly(self._exact, budget_bytes)
        self._forget_beaten()

    def _solve_with_transfers(self, transfers: OffloadSearch, budget_bytes: int) -> None:
        """Search from what there is without transfers: answers, too, where nothing is streamed."""
        assert self._without is not None
        shares = STREAMING_SHARES if self.graph.resting else (1.0,)
        seeds = []
        for share in shares:
            found = self._without.best_within(int(share * budget_bytes))
            if not self.graph.resting:
                self._found.append(found)
            if found.schedule not in seeds:
                seeds.append(found.schedule)
        self._found.extend(transfers.fastest(budget_bytes, seeds))

    def best_within(self, budget_bytes: int) -> Found:
        """Return the fastest schedule found within a budget, else the one with the least peak."""
        if self._impossible_bytes < budget_bytes < self.plain_peak_bytes:
            if budget_bytes not in self._bounds:
                self._solve(budget_bytes)
        return self._fastest_within(budget_bytes) or self.smallest()

    def _solve_exactly(self, exact: ExactSearch, budget_bytes: int) -> None:
        """Search with few nodes; where that does not do, go on narrowly from good seeds."""
        if self._ask(exact, budget_bytes, FEW_NODES, 0):
            return
        keeping = ExactSearch(self.graph, keep_outputs=True)
        self._ask(keeping, budget_bytes, 3 * FEW_NODES, 0)
        self._found.extend(self.local.fastest(budget_bytes))
        for search, num_nodes, width in ((exact, 3 * FEW_NODES, 100), (keeping, MANY_NODES, 1000)):
            best = self._fastest_within(budget_bytes)
            if best is not None and best.seconds <= CLOSE * self._bounds[budget_bytes]:
                return
            self._ask(search, budget_bytes, num_nodes, width)
        if self._fastest_within(budget_bytes) is None:
            self._ask_any(exact, budget_bytes, MANY_NODES // 4)

    def _ask(self, exact: ExactSearch, budget_bytes: int, max_nodes: int, width: int) -> bool:
        """Run one exact search, remember what it finds, return whether that settles the budget."""
        known = self._fastest_within(budget_bytes)
        upper = math.inf if known is None else known.seconds - self.plain_seconds
        answer = exact.fastest(budget_bytes, max_nodes, min(upper, 1e300), width)
        if answer.order is not None:
            self._found.append(schedule_of(self.graph, answer.order))
        if answer.is_proven:
            best = self._fastest_within(budget_bytes)
            self._proven[budget_bytes] = math.inf if best is None else best.seconds
        elif answer.bound_seconds > 0 and math.isfinite(answer.bound_seconds):
            bound = self.plain_seconds + answer.bound_seconds
            self._bounds[budget_bytes] = max(self._bounds[budget_bytes], bound)
        return answer.is_proven

    def _ask_any(self, exact: ExactSearch, budget_bytes: int, max_nodes: int) -> None:
        """Look for any schedule within a budget, and remember if there can be none."""
        for prefer_short in (True, False):
            answer = exact.any_within(budget_bytes, max_nodes, prefer_short)
            if answer.order is not None:
                self._found.append(schedule_of(self.graph, answer.order))
            if answer.is_proven:
                self._impossible_bytes = max(self._impossible_bytes, budget_bytes)
            if answer.is_proven or answer.order is not None:
                return

    def _shrink(self, exact: ExactSearch) -> None:
        """Look for schedules below the smallest peak, by smaller and smaller steps."""
        best = min(f.peak_bytes for f in self._found)
        for part, finer, max_nodes in ((2, 2, FEW_NODES // 4), (96, 8, 2 * FEW_NODES)):
            while part < 2048 and best // part > 0:
                budget_bytes = best - best // part
                if budget_bytes > self._impossible_bytes:
                    self._ask_any(exact, budget_bytes, max_nodes)
                reached = min(f.peak_bytes for f in self._found)
                part = part if reached < best else finer * part
                best = reached

    # -- results

    def _as_plan(self, found: Found, budget_bytes: int | None) -> Plan:
        bound = self.plain_seconds
        if self.graph.resting:
            bound = lower_bound_seconds(self.graph, budget_bytes)
        elif budget_bytes is not None and budget_bytes < self.plain_peak_bytes:
            bound = self._bounds.get(budget_bytes, self.plain_seconds)
            proven = self._proven.get(budget_bytes)
            if proven is not None and found.seconds >= proven * (1 - 1e-9):
                bound = max(bound, proven)
        bound = min(bound, found.seconds)
        optimal = found.seconds <= bound * (1 + 1e-9)
        plan = Plan(
            found.schedule, budget_bytes, found.peak_bytes, found.seconds, self.plain_seconds,
            self.plain_peak_bytes, bound, PlanStatus.OPTIMAL if optimal else PlanStatus.FEASIBLE,
            num_reruns=sum(self.graph.reruns(found.schedule).values()),
        )
        if self._transfers is None:
            return plan
        timeline = simulate(self.graph, found.schedule, self.machine)
        written = self.graph.written(found.schedule)
        return replace(
            plan,
            lane_seconds=timeline.lane_seconds,
            wait_seconds=timeline.wait_seconds,
            offloaded_bytes=sum(self.graph.buffers[b].bytes for b in written),
        )


def least_peak_bytes(graph: StepGraph) -> int:
    """Return the most that one operation needs in memory: no schedule's peak is smaller."""
    size = [0 if b.id in graph.resident else b.bytes for b in graph.buffers]
    most = 0
    for operation in graph.computations:
        touched = sum(size[b] for b in {*operation.touches, *operation.creates})
        in_place = max((size[created] for created, _ in operation.overwrites), default=0)
        most = max(most, touched + operation.workspace_bytes - in_place)
    return most


_latest: list[Planner] = []
# Schedules of steps planned before, by everything but the operations' times.
_earlier: OrderedDict[tuple[StepGraph, Machine | None], list[Schedule]] = OrderedDict()


def _planner_of(graph: StepGraph, machine: Machine | None) -> Planner:
    """Return the latest planner, with transfers or without, if it is of this graph; else a new one.

    A new one of a step that was planned before with other times (before a rehearsal, by an earlier
    `fit`) knows the schedules found then: what fitted still fits.
    """
    if not graph.transfers:
        machine = None
    for planner in _latest:
        if planner.machine == machine and planner.graph == graph:
            return planner
    for planner in _latest:
        _remember(planner)
    new = Planner(graph, machine)
    new.know(_earlier.get((_without_times(graph), machine), ()))
    _latest[:] = [p for p in _latest if (p.machine is None) != (machine is None)] + [new]
    return new


def _remember(planner: Planner) -> None:
    key = (_without_times(planner.graph), planner.machine)
    _earlier[key] = planner.some_schedules(NUM_REMEMBERED_SCHEDULES)
    _earlier.move_to_end(key)
    for key in list(_earlier)[:-NUM_REMEMBERED_STEPS]:
        del _earlier[key][1:]
    while len(_earlier) > NUM_REMEMBERED_SMALLEST:
        _earlier.popitem(last=False)


def _without_times(graph: StepGraph) -> StepGraph:
    return graph.with_computations(replace(o, seconds=0.0) for o in graph.computations)


def plan_schedule(
    graph: StepGraph, budget_bytes: int | None, machine: Machine | None = None
) -> Plan:
    """Return the fastest schedule found for a step within a budget.

    Asked again about an equal graph, it goes on from what it found before: plans
    get no slower, and a larger budget never gets a slower plan than a smaller one planned before.

    Args:
        graph: the step, as captured.
        budget_bytes: for what the schedule allocates; resident buffers are not counted. None for no
            limit: the plain step.
        machine: with the lanes of the graph's transfers, if it has some.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.
    """
    return _planner_of(graph, machine).plan(budget_bytes)


def smallest_peak_bytes(graph: StepGraph, machine: Machine | None = None) -> int:
    """Return the smallest peak found: `plan_schedule` finds a schedule for it, asked in any order.

    The plan made for it may peak lower, by luck; so low, a schedule might not be found again.
    """
    return _planner_of(graph, machine).smallest().peak_bytes


def smallest_plan(graph: StepGraph, machine: Machine | None = None) -> Plan:
    """Return the plan with the smallest peak found."""
    return _planner_of(graph, machine).smallest_plan()


def pareto(graph: StepGraph, num_budgets: int = 8, machine: Machine | None = None) -> list[Plan]:
    """Return plans from the plain step's peak down to the smallest feasible, ever slower.

    Args:
        graph: the step.
        num_budgets: how many budgets to look at, evenly spaced.
        machine: with the lanes of the graph's transfers, if it has some.
    """
    planner = _planner_of(graph, machine)
    high, low = planner.plain_peak_bytes, planner.smallest().peak_bytes
    if low >= high:
        return [planner.plan(None)]
    steps = max(1, num_budgets - 1)
    budgets = [high - (high - low) * index // steps for index in range(steps + 1)]
    for budget_bytes in budgets:
        planner.plan(budget_bytes)
    # Now that all are known: a schedule found for less memory may serve more, too.
    return [planner.plan(None), *(planner.plan(b) for b in budgets[1:])]
