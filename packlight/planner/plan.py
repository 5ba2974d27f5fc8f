"""From a step and a budget to a plan, and the memory of what was found before.

Small steps are searched exactly, larger ones by a dynamic program and local moves. Every schedule
found is remembered: the answer is always the fastest known one that fits, so that within a planner
a larger budget never gets a slower plan than a smaller one planned before it. Two planners that are
asked the same questions in the same order give the same answers.

On a device with a link, what was found without transfers is where the search with them starts
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
from packlight.step import Action, Device, Plan, PlanStatus, Schedule, StepGraph, simulate

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
        device: where it runs; without a link, plans are free of transfers.
        plain: the schedule without recomputation. With stored buffers, it fetches each of them once
            and keeps it.
        plain_peak_bytes: its peak.
        plain_seconds: its duration; with stored buffers, without its waiting for them.
    """

    def __init__(
        self, graph: StepGraph, device: Device | None = None, without: Planner | None = None
    ) -> None:
        """Prepare planning.

        Args:
            graph: the step.
            device: where it runs.
            without: a planner of the same graph (with nothing stored) without a device, to go on
                from what it found; by default a new one.
        """
        self.graph, self.device = graph, device
        self._transfers: OffloadSearch | None = None
        self._without: Planner | None = None
        self._exact: ExactSearch | None = None
        if device is not None and device.links:
            self._without = without or Planner(replace(graph, stored=()))
            if graph.stored and without is None:
                # What it finds is a start for something else: it need not be the optimum.
                self._without._exact = None
            self._transfers = OffloadSearch(graph, device, lambda: self.local.views)
        if graph.stored:
            if self._transfers is None:
                raise ValueError(
                    f"{len(graph.stored)} buffers are stored on a far tier, but the device "
                    f"{'has no link' if device is not None else 'is not given'}\n"
                    "hint: pass a Device with a Link, or a graph with stored=()"
                )
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
        # Without stored buffers, nothing is faster than the plain step.
        is_open = limit < self.plain_peak_bytes or bool(self.graph.stored)
        if limit not in self._bounds and limit > self._impossible_bytes and is_open:
            self._solve(limit)
        best = self._fastest_within(limit)
        if best is None:
            smallest = self.smallest()
            if smallest.peak_bytes > limit:
                raise infeasible_budget(self.graph, limit, smallest.schedule, self.device)
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
                if self._without is not None and not self.graph.stored:
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
            timeline = simulate(self.graph, schedule, self.device)
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
        self._bounds[budget_bytes] = lower_bound_seconds(self.graph, budget_bytes, self.device)
        if self._transfers is not None:
            self._solve_with_transfers(self._transfers, budget_bytes)
        elif self._exact is None:
            self._found.extend(self.local.fastest(budget_bytes))
        else:
            self._solve_exactly(self._exact, budget_bytes)
        self._forget_beaten()

    def _solve_with_transfers(self, transfers: OffloadSearch, budget_bytes: int) -> None:
        """Search from what there is without transfers; with nothing stored, remember that, too."""
        assert self._without is not None
        shares = STREAMING_SHARES if self.graph.stored else (1.0,)
        seeds = []
        for share in shares:
            found = self._without.best_within(int(share * budget_bytes))
            if not self.graph.stored:
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
        if self.graph.stored:
            bound = lower_bound_seconds(self.graph, budget_bytes, self.device)
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
        )
        if self._transfers is None:
            return plan
        timeline = simulate(self.graph, found.schedule, self.device)
        written = [i.target for i in found.schedule.instructions if i.action is Action.OFFLOAD]
        return replace(
            plan,
            link_seconds=timeline.link_seconds,
            wait_seconds=timeline.wait_seconds,
            offloaded_bytes=sum(self.graph.buffers[b].bytes for b in written),
        )


def least_peak_bytes(graph: StepGraph) -> int:
    """Return the most that one operation needs in memory: no schedule's peak is smaller."""
    size = [0 if b.id in graph.resident else b.bytes for b in graph.buffers]
    most = 0
    for operation in graph.operations:
        touched = sum(size[b] for b in {*operation.touches, *operation.creates})
        in_place = max((size[created] for created, _ in operation.overwrites), default=0)
        most = max(most, touched + operation.workspace_bytes - in_place)
    return most


_latest: list[Planner] = []
# Schedules of steps planned before, by everything but the operations' times.
_earlier: OrderedDict[tuple[StepGraph, Device | None], list[Schedule]] = OrderedDict()


def _planner_of(graph: StepGraph, device: Device | None) -> Planner:
    """Return the latest planner, with a link or without, if it is of this graph; else a new one.

    A new one of a step that was planned before with other times (before a rehearsal, by an earlier
    `fit`) knows the schedules found then: what fitted still fits.
    """
    if device is not None and not device.links:
        device = None
    for planner in _latest:
        if planner.device == device and planner.graph == graph:
            return planner
    for planner in _latest:
        _remember(planner)
    new = Planner(graph, device)
    new.know(_earlier.get((_without_times(graph), device), ()))
    _latest[:] = [p for p in _latest if (p.device is None) != (device is None)] + [new]
    return new


def _remember(planner: Planner) -> None:
    key = (_without_times(planner.graph), planner.device)
    _earlier[key] = planner.some_schedules(NUM_REMEMBERED_SCHEDULES)
    _earlier.move_to_end(key)
    for key in list(_earlier)[:-NUM_REMEMBERED_STEPS]:
        del _earlier[key][1:]
    while len(_earlier) > NUM_REMEMBERED_SMALLEST:
        _earlier.popitem(last=False)


def _without_times(graph: StepGraph) -> StepGraph:
    return replace(graph, operations=tuple(replace(o, seconds=0.0) for o in graph.operations))


def plan_schedule(
    graph: StepGraph, budget_bytes: int | None, device: Device | None = None
) -> Plan:
    """Return the fastest schedule found for a step within a budget.

    Asked again about an equal graph, it goes on from what it found before: plans
    get no slower, and a larger budget never gets a slower plan than a smaller one planned before.

    Args:
        graph: the step, as captured.
        budget_bytes: for what the schedule allocates; resident buffers are not counted. None for no
            limit: the plain step.
        device: with a link, the plan may offload to and fetch from the memory behind it.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.
    """
    return _planner_of(graph, device).plan(budget_bytes)


def smallest_peak_bytes(graph: StepGraph, device: Device | None = None) -> int:
    """Return the smallest peak found: `plan_schedule` finds a schedule for it, asked in any order.

    The plan made for it may peak lower, by luck; so low, a schedule might not be found again.
    """
    return _planner_of(graph, device).smallest().peak_bytes


def smallest_plan(graph: StepGraph, device: Device | None = None) -> Plan:
    """Return the plan with the smallest peak found."""
    return _planner_of(graph, device).smallest_plan()


def pareto(graph: StepGraph, num_budgets: int = 8, device: Device | None = None) -> list[Plan]:
    """Return plans from the plain step's peak down to the smallest feasible, ever slower.

    Args:
        graph: the step.
        num_budgets: how many budgets to look at, evenly spaced.
        device: with a link, plans may offload to and fetch from the memory behind it.
    """
    planner = _planner_of(graph, device)
    high, low = planner.plain_peak_bytes, planner.smallest().peak_bytes
    if low >= high:
        return [planner.plan(None)]
    steps = max(1, num_budgets - 1)
    budgets = [high - (high - low) * index // steps for index in range(steps + 1)]
    for budget_bytes in budgets:
        planner.plan(budget_bytes)
    # Now that all are known: a schedule found for less memory may serve more, too.
    return [planner.plan(None), *(planner.plan(b) for b in budgets[1:])]
