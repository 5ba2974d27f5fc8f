"""From a step and a budget to a plan. The answer depends on those two alone.

Small steps are searched exactly, larger ones by a dynamic program and local moves. What a planner
found for one budget plays no part in its answer for another, so every process that is asked about
the same step and budget gives the same plan, whatever it was asked before.

The smallest budget is a question of its own, about bytes alone (`smallest.py`): it is answered when
a search finds nothing, and then its schedule is where the search goes on.

With transfers in the graph, what is found without them is where the search with them starts
(`offload.py`), and counts, too: transfers never make a plan slower or larger.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from packlight.planner.bound import lower_bound_seconds
from packlight.planner.explain import infeasible_budget
from packlight.planner.facts import Facts
from packlight.planner.offload import OffloadSearch
from packlight.planner.plain import plain_schedule
from packlight.planner.prove import Attempt, Small, is_small
from packlight.planner.search import Found, LocalSearch
from packlight.planner.smallest import low_schedule, priced, smallest_schedules
from packlight.step import Limit, Machine, Plan, Schedule, StepGraph, Termination, simulate

STREAMING_SHARES = (0.9, 0.6, 0.4)
# Budgets that are not much smaller than the smallest that is known to do may do, too.
NEAR = 0.9


class Planner:
    """Plans one graph for any number of budgets; segments and options are found once.

    When reductions start and where their sums are used is given with a graph: whatever a schedule
    runs again in between, it waits for them no longer. So the search sees them in line.

    Attributes:
        graph: the step, with reductions in line.
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
            without: a planner of the same graph without transfers, which may have found something
                already; by default a new one.
        """
        self._real, self.machine = graph, machine
        graph = self.graph = graph.with_reductions_in_line(machine)
        self._transfers: OffloadSearch | None = None
        self._without: Planner | None = None
        self._is_exact, self._is_start = is_small(graph), False
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
                # What it finds is a start for something else: it need not be the optimum, nor the
                # smallest that there is.
                self._without._is_exact, self._without._is_start = False, True
            self._transfers = OffloadSearch(graph, machine, lambda: self.local.views)
        if graph.resting:
            assert self._transfers is not None
            first = self._transfers.plain()
            self.plain, self.plain_peak_bytes = first.schedule, first.peak_bytes
            self.plain_seconds = graph.seconds
        else:
            first = self._found(plain_schedule(graph))
            self.plain, self.plain_peak_bytes = first.schedule, first.peak_bytes
            self.plain_seconds = first.seconds
        self._plain = first
        self._attempts: dict[int, Attempt] = {}

    @cached_property
    def local(self) -> LocalSearch:
        """The search by segments and local moves, set up when first needed."""
        return LocalSearch(self.graph) if self._without is None else self._without.local

    def plan(self, budget_bytes: int | None, known: Iterable[Schedule] = ()) -> Plan:
        """Return the fastest plan found within a budget.

        Args:
            budget_bytes: for what the schedule allocates; None for no limit.
            known: schedules that are taken where the search finds nothing: what fitted with other
                times still fits.

        Raises:
            InfeasibleBudgetError: nothing was found that fits; names the smallest budget that does.
        """
        limit = self._limit if budget_bytes is None else budget_bytes
        attempt = self._attempt(limit)
        if budget_bytes is None and attempt.best is None:
            attempt = self._attempt(self.plain_peak_bytes)
        if attempt.best is None:
            fitting = [f for f in map(self._found, known) if f.peak_bytes <= limit]
            if not fitting:
                smallest = self.smallest()
                raise infeasible_budget(self.graph, limit, smallest.schedule, self.machine)
            attempt = replace(attempt, found=fitting, is_proven=False)
        return self._as_plan(attempt, budget_bytes)

    @cached_property
    def _limit(self) -> int:
        """What a step holds at most for which nobody named a budget."""
        if self._transfers is None or not self.graph.gathered_from:
            return self.plain_peak_bytes
        # Who has parameters lie in pieces wants them to: they are whole for longer only where that
        # takes nothing.
        return min(self.plain_peak_bytes, self._transfers.peak_of_reading_anew())

    def smallest_plan(self) -> Plan:
        """Return the plan for the smallest budget that is known to do."""
        return self.plan(self.smallest().peak_bytes)

    def smallest(self) -> Found:
        """Return the schedule with the smallest peak found, whatever operations take."""
        return self._small[0]

    @cached_property
    def _small(self) -> list[Found]:
        """Schedules with small peaks, the smallest first."""
        if self._transfers is None:
            return [self._found(schedule) for schedule in smallest_schedules(self.graph)]
        assert self.machine is not None and self._without is not None
        lanes = tuple(replace(lane, compute_share=0.0) for lane in self.machine.lanes)
        free = next(priced(self.graph))
        views = LocalSearch(free.without_transfers()).views
        search = OffloadSearch(free, replace(self.machine, lanes=lanes), lambda: views)
        found = [self._plain, *(self._found(f.schedule) for f in search.smallest())]
        if not self.graph.resting:
            found.append(self._without.smallest())
        return sorted(found, key=lambda f: (f.peak_bytes, f.seconds))

    def _found(self, schedule: Schedule) -> Found:
        timeline = simulate(self.graph, schedule, self.machine)
        return Found(schedule, timeline.seconds, timeline.peak_bytes)

    # -- search

    def _attempt(self, budget_bytes: int) -> Attempt:
        """Return what is found out about a budget."""
        if budget_bytes not in self._attempts:
            self._attempts[budget_bytes] = self._new_attempt(budget_bytes)
        return self._attempts[budget_bytes]

    def _new_attempt(self, budget_bytes: int) -> Attempt:
        # Where nothing rests elsewhere, nothing is faster than the plain step.
        if budget_bytes >= self.plain_peak_bytes and not self.graph.resting:
            return Attempt(budget_bytes, self.plain_seconds, [self._plain], is_proven=True)
        bound_seconds = lower_bound_seconds(self.graph, budget_bytes)
        attempt = Attempt(budget_bytes, bound_seconds, [self._plain])
        if budget_bytes < Facts(self.graph).least_peak_bytes:
            return attempt
        if self._transfers is not None:
            self._with_transfers(self._transfers, attempt)
        elif self._is_exact:
            Small(self.graph).attempt(attempt, self.local.fastest)
        else:
            attempt.found.extend(self.local.fastest(budget_bytes))
        if self._is_start or attempt.best is not None:
            return attempt
        if budget_bytes >= NEAR * self.smallest().peak_bytes:
            attempt.is_proven = False
            attempt.found.extend(self._small)
            if self._transfers is None:
                fitting = [f.schedule for f in self._small if f.peak_bytes <= budget_bytes]
                attempt.found.extend(self.local.fastest_small(budget_bytes, fitting))
        return attempt

    def _with_transfers(self, transfers: OffloadSearch, attempt: Attempt) -> None:
        """Search from what there is without transfers; that counts, too, where nothing rests."""
        assert self._without is not None
        shares = STREAMING_SHARES if self.graph.resting else (1.0,)
        seeds = []
        for share in shares:
            found = self._without._start_within(int(share * attempt.budget_bytes))
            if not self.graph.resting:
                attempt.found.append(found)
            if found.schedule not in seeds:
                seeds.append(found.schedule)
        attempt.found.extend(transfers.fastest(attempt.budget_bytes, seeds))

    def _start_within(self, budget_bytes: int) -> Found:
        """Return the fastest schedule found within a budget, else one with a small peak."""
        return self._attempt(budget_bytes).best or (self._low if self._is_start else self._small[0])

    @cached_property
    def _low(self) -> Found:
        """A schedule with a small peak, soon found."""
        return self._found(low_schedule(self.local))

    # -- results

    def _as_plan(self, attempt: Attempt, budget_bytes: int | None) -> Plan:
        found = attempt.best
        assert found is not None
        bound = found.seconds if attempt.is_proven else attempt.bound_seconds
        plan = Plan(
            found.schedule, budget_bytes, found.peak_bytes, found.seconds, self.plain_seconds,
            self.plain_peak_bytes, Termination.at(found.seconds, bound, attempt.limit),
            num_reruns=sum(self.graph.reruns(found.schedule).values()),
        )
        if self._transfers is None:
            return _beside_reductions(plan, self._real, self.machine)
        timeline = simulate(self.graph, found.schedule, self.machine)
        written = self.graph.written(found.schedule)
        plan = replace(
            plan,
            lane_seconds=timeline.lane_seconds,
            wait_seconds=timeline.wait_seconds,
            offloaded_bytes=sum(self.graph.buffers[b].bytes for b in written),
        )
        return _beside_reductions(plan, self._real, self.machine)


def least_peak_bytes(graph: StepGraph) -> int:
    """Return the most that one operation needs in memory: no schedule's peak is smaller."""
    return Facts(graph).least_peak_bytes


def plan_schedule(
    graph: StepGraph,
    budget_bytes: int | None,
    machine: Machine | None = None,
    known: Iterable[Schedule] = (),
) -> Plan:
    """Return the fastest schedule found for a step within a budget: the same whoever asks.

    Args:
        graph: the step, as captured.
        budget_bytes: for what the schedule allocates; resident buffers are not counted. None for no
            limit: the plain step.
        machine: with the lanes of the graph's transfers, if it has some.
        known: schedules that are taken where the search finds nothing: what fitted with other times
            still fits.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found, the same for
            every budget asked for.
    """
    return Planner(graph, machine).plan(budget_bytes, known)


def _beside_reductions(plan: Plan, graph: StepGraph, machine: Machine | None) -> Plan:
    """Return a plan made with reductions in line with the time that they really take."""
    if not graph.reductions:
        return plan
    planned = simulate(graph, plan.schedule, machine)
    plain = simulate(graph, plain_schedule(graph), machine) if not graph.resting else None
    return replace(
        plan,
        seconds=planned.seconds,
        plain_seconds=plan.plain_seconds if plain is None else plain.seconds,
        termination=Termination.at(
            planned.seconds, plan.bound_seconds, plan.termination.limit or Limit.MOVES
        ),
        lane_seconds=planned.lane_seconds,
        wait_seconds=planned.wait_seconds,
    )


def smallest_peak_bytes(graph: StepGraph, machine: Machine | None = None) -> int:
    """Return the smallest budget that is known to do, whatever operations take."""
    return Planner(graph, machine).smallest().peak_bytes


def smallest_plan(graph: StepGraph, machine: Machine | None = None) -> Plan:
    """Return the plan for the smallest budget that is known to do."""
    return Planner(graph, machine).smallest_plan()


def pareto(graph: StepGraph, num_budgets: int = 8, machine: Machine | None = None) -> list[Plan]:
    """Return plans from the plain step's peak down to the smallest feasible, ever slower.

    What is found for less memory may serve more, too: here, unlike in `plan_schedule`, it does.

    Args:
        graph: the step.
        num_budgets: how many budgets to look at, evenly spaced.
        machine: with the lanes of the graph's transfers, if it has some.
    """
    planner = Planner(graph, machine)
    high, low = planner.plain_peak_bytes, planner.smallest().peak_bytes
    if low >= high:
        return [planner.plan(None)]
    steps = max(1, num_budgets - 1)
    budgets = [high - (high - low) * index // steps for index in range(steps + 1)]
    plans: list[Plan] = []
    for budget_bytes in reversed(budgets[1:]):
        plan = planner.plan(budget_bytes)
        if plans and plans[0].seconds < plan.seconds:
            found, ended = plans[0], plan.termination
            limit = ended.limit or Limit.MOVES  # that it proved an optimum says this one is it
            termination = Termination.at(found.seconds, ended.bound_seconds, limit)
            plan = replace(found, budget_bytes=budget_bytes, termination=termination)
        plans.insert(0, plan)
    return [planner.plan(None), *plans]
