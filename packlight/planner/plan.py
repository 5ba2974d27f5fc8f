"""From a step and a budget to a plan: segments, options, chain, refinement, bound.

Several segmentations and several sizes of the chain's memory are tried: the chain's own accounting is
coarser than the simulator's, which alone decides what fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from packlight.errors import InfeasibleBudgetError
from packlight.planner.bound import lower_bound_seconds
from packlight.planner.chain import Chain
from packlight.planner.plain import plain_schedule, schedule_from_order
from packlight.planner.refine import Effort, improve, repair, shake
from packlight.planner.retention import Retention
from packlight.planner.segments import (
    Segment,
    backward_labels,
    build_segments,
    cut_points,
    reorder_backward,
    restore_ids,
)
from packlight.step import Plan, PlanStatus, Schedule, StepGraph, simulate
from packlight.step.types import BufferKind

CHAIN_LEVELS = 400
SMALL_GRAPH = 120


@dataclass
class Planner:
    """Plans one graph for any number of budgets; segments and options are found once.

    Attributes:
        graph: the step.
    """

    graph: StepGraph
    _views: list[tuple[StepGraph, list[int], list[Segment]]] = field(default_factory=list)
    _plans: dict[int, tuple[Schedule, float, int]] = field(default_factory=dict)
    _smallest: tuple[Schedule, float, int] | None = None

    def __post_init__(self) -> None:
        self.plain = plain_schedule(self.graph)
        timeline = simulate(self.graph, self.plain)
        self.plain_peak_bytes, self.plain_seconds = timeline.peak_bytes, timeline.seconds
        for max_segments in self._granularities():
            cuts = cut_points(self.graph, max_segments)
            labels = backward_labels(self.graph, cuts)
            graph, old_ids = reorder_backward(self.graph, labels)
            segments = build_segments(graph, cuts, sorted(labels, reverse=True))
            if not self._views or len(segments) != len(self._views[-1][2]):
                self._views.append((graph, old_ids, segments))

    def _granularities(self) -> list[int]:
        num = self.graph.num_forward
        return [min(num, 120)] if num <= 24 else [min(120, num // 4), max(4, min(40, num // 12))]

    def plan(self, budget_bytes: int | None) -> Plan:
        """Return the fastest plan found within a budget.

        Raises:
            InfeasibleBudgetError: nothing was found that fits; names the smallest budget that does.
        """
        if budget_bytes is None or budget_bytes >= self.plain_peak_bytes:
            return self._finish(
                (self.plain, self.plain_seconds, self.plain_peak_bytes), budget_bytes
            )
        found = self._search(budget_bytes)
        if found is None:
            smallest = self.smallest()
            if smallest[2] > budget_bytes:
                raise self._infeasible(budget_bytes, smallest)
            found = self._polish(smallest, budget_bytes)
        return self._finish(found, budget_bytes)

    def smallest_plan(self) -> Plan:
        """Return the plan with the smallest peak found, made as fast as it can be at that peak."""
        smallest = self.smallest()
        return self._finish(self._polish(smallest, smallest[2]), smallest[2])

    # -- search

    def _effort(self) -> int:
        """Evaluations per refinement: enough for small graphs to be searched well."""
        return 60_000 if len(self.graph.operations) <= SMALL_GRAPH else 6_000

    def _search(self, budget_bytes: int) -> tuple[Schedule, float, int] | None:
        best: tuple[Schedule, float, int] | None = None
        for graph, old_ids, segments in self._views:
            seeds: list[list[int]] = []
            for scale in (1.0, 1.04, 1.1):
                chain = self._chain(graph, segments, int(budget_bytes * scale))
                if chain.smallest_level() is not None:
                    seeds.append(chain.order())
            if len(graph.operations) <= 4 * SMALL_GRAPH:
                seeds.append(list(range(len(graph.operations))))
            for order in seeds:
                found = self._refined(graph, old_ids, order, budget_bytes)
                if found is not None and (best is None or found[1] < best[1] - 1e-12):
                    best = found
        return best

    def _chain(self, graph: StepGraph, segments: list[Segment], budget_bytes: int) -> Chain:
        sizes = [0 if b.kind.is_resident else b.bytes for b in graph.buffers]
        pinned = sum(
            graph.buffers[b].bytes for b in graph.outputs
            if graph.buffers[b].kind is BufferKind.OUTPUT
        )
        return Chain(segments, max(1, budget_bytes - pinned), sizes, CHAIN_LEVELS)

    def _refined(
        self, graph: StepGraph, old_ids: list[int], order: list[int], budget_bytes: int
    ) -> tuple[Schedule, float, int] | None:
        retention = Retention.from_order(graph, order)
        effort = Effort(self._effort())
        if not repair(retention, budget_bytes, effort):
            return None
        improve(retention, budget_bytes, effort)
        shake(retention, budget_bytes, effort)
        return self._judged(graph, old_ids, retention, budget_bytes)

    def _judged(
        self, graph: StepGraph, old_ids: list[int], retention: Retention, budget_bytes: int
    ) -> tuple[Schedule, float, int] | None:
        schedule = _schedule(graph, retention)
        timeline = simulate(graph, schedule)
        if timeline.peak_bytes > budget_bytes:
            return None
        return restore_ids(schedule, old_ids), timeline.seconds, timeline.peak_bytes

    def smallest(self) -> tuple[Schedule, float, int]:
        """Return the schedule with the smallest peak found, its seconds and its peak."""
        if self._smallest is None:
            best = (self.plain, self.plain_seconds, self.plain_peak_bytes)
            for graph, old_ids, segments in self._views:
                chain = self._chain(graph, segments, self.plain_peak_bytes)
                level = chain.smallest_level()
                orders = [list(range(len(graph.operations)))]
                if level is not None:
                    orders.append(chain.order(level))
                    pinned = self.plain_peak_bytes - chain.budget_bytes
                    size = int((level + 1) * chain.level_bytes) + pinned
                    finer = self._chain(graph, segments, size)
                    level = finer.smallest_level()
                    if level is not None:
                        orders.append(finer.order(level))
                for order in orders:
                    best = min(
                        best, self._lowered(graph, old_ids, order, best), key=lambda f: (f[2], f[1])
                    )
            polished = self._polish(best, best[2])
            self._smallest = min(best, polished, key=lambda f: (f[2], f[1]))
        return self._smallest

    def _lowered(
        self,
        graph: StepGraph,
        old_ids: list[int],
        order: list[int],
        best: tuple[Schedule, float, int],
    ) -> tuple[Schedule, float, int]:
        retention = Retention.from_order(graph, order)
        effort = Effort(2 * self._effort())
        state = retention.copy_state()
        # Each success moves the target just below the peak reached.
        step = 0.9
        target = int(retention.peak_bytes * step)
        while effort.left(retention) and step < 0.9999:
            if repair(retention, target, effort):
                state = retention.copy_state()
                target = int(retention.peak_bytes * step)
            else:
                retention.restore(state)
                step = 1 - (1 - step) / 2
                target = int(retention.peak_bytes * step)
        retention.restore(state)
        found = self._judged(graph, old_ids, retention, 1 << 62)
        return best if found is None else found

    def _polish(
        self, found: tuple[Schedule, float, int], budget_bytes: int
    ) -> tuple[Schedule, float, int]:
        order = [i.target for i in found[0].instructions if i.action == "compute"]
        position = {}
        for place, index in enumerate(order):
            position.setdefault(index, place)
        first_runs = sorted(position, key=lambda i: position[i])
        if first_runs != list(range(len(first_runs))):
            # Planned on a reordered backward: refine it there.
            for graph, old_ids, _ in self._views:
                if old_ids == first_runs:
                    new_id = {old: new for new, old in enumerate(old_ids)}
                    better = self._refined(
                        graph, old_ids, [new_id[i] for i in order], budget_bytes
                    )
                    break
            else:
                better = None
        else:
            better = self._refined(
                self.graph, list(range(len(first_runs))), order, budget_bytes
            )
        return better if better is not None and better[1] <= found[1] else found

    # -- results

    def _finish(self, found: tuple[Schedule, float, int], budget_bytes: int | None) -> Plan:
        schedule, seconds, peak = found
        timeline = simulate(self.graph, schedule)
        assert timeline.peak_bytes == peak, "a reordered schedule is worth what it was judged"
        bound = min(lower_bound_seconds(self.graph, budget_bytes), seconds)
        optimal = seconds <= bound * (1 + 1e-9)
        return Plan(
            schedule, budget_bytes, peak, seconds, self.plain_seconds, self.plain_peak_bytes, bound,
            PlanStatus.OPTIMAL if optimal else PlanStatus.FEASIBLE,
        )

    def _infeasible(
        self, budget_bytes: int, smallest: tuple[Schedule, float, int]
    ) -> InfeasibleBudgetError:
        timeline = simulate(self.graph, smallest[0])
        instruction = smallest[0].instructions[timeline.peak_index]
        operation = self.graph.operations[instruction.target]
        where = f"{operation.name}" + (f" in {operation.layer!r}" if operation.layer else "")
        live = [(self.graph.buffers[b].name, self.graph.buffers[b].bytes)
                for b in timeline.peak_buffers]
        if timeline.peak_workspace_bytes:
            live.append(("workspace", timeline.peak_workspace_bytes))
        live.sort(key=lambda item: -item[1])
        return InfeasibleBudgetError(
            budget_bytes, smallest[2], f"the {operation.phase} of {where}", live,
            "a smaller batch makes every activation smaller",
        )


def _schedule(graph: StepGraph, retention: Retention) -> Schedule:
    order = retention.order()
    num_forward = sum(
        1 + len(retention.lists[p]) for p in range(min(graph.num_forward, retention.num_positions))
    )
    return schedule_from_order(graph, order, num_forward)


def plan_schedule(graph: StepGraph, budget_bytes: int | None) -> Plan:
    """Return the fastest schedule found for a step within a budget.

    Args:
        graph: the step, as captured.
        budget_bytes: for what the schedule allocates; resident buffers are not counted. None for no
            limit: the plain step.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.

    The same graph and budget give the same plan.
    """
    return Planner(graph).plan(budget_bytes)


def smallest_plan(graph: StepGraph) -> Plan:
    """Return the plan with the smallest peak found."""
    return Planner(graph).smallest_plan()


def pareto(graph: StepGraph, num_budgets: int = 8) -> list[Plan]:
    """Return plans from the plain step's peak down to the smallest feasible, none slower than the next.

    Args:
        graph: the step.
        num_budgets: how many budgets to look at, evenly spaced.
    """
    planner = Planner(graph)
    plans = [planner.plan(None)]
    smallest = planner.smallest_plan()
    high, low = planner.plain_peak_bytes, smallest.peak_bytes
    for index in range(1, num_budgets - 1):
        plans.append(planner.plan(high - (high - low) * index // (num_budgets - 1)))
    if low < high:
        plans.append(smallest)
    # A plan for a smaller budget that is faster serves the larger budget too.
    for index in range(len(plans) - 2, -1, -1):
        if plans[index + 1].seconds < plans[index].seconds:
            from dataclasses import replace

            plans[index] = replace(plans[index + 1], budget_bytes=plans[index].budget_bytes)
    return plans
