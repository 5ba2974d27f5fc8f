"""Schedules from the chain's dynamic program, refined by local moves.

Several segmentations and several sizes of the chain's memory are tried: the chain's own accounting
is coarser than the simulator's, which alone decides what fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from packlight.planner.chain import Chain, carries
from packlight.planner.delay import Delayed, delayed
from packlight.planner.facts import Facts, Segment
from packlight.planner.plain import schedule_from_order, without_useless_runs
from packlight.planner.refine import Effort, improve, lower, repair, shake
from packlight.planner.retention import Retention
from packlight.planner.segments import (
    backward_labels,
    build_segments,
    cut_points,
    reorder_backward,
    replace_id,
    restore_ids,
)
from packlight.step import Action, Schedule, StepGraph, simulate
from packlight.step.types import BufferKind

CHAIN_LEVELS = 400
SCALES = (1.0, 0.94, 0.97, 0.99, 1.02, 1.04, 1.07, 1.1)
MAX_FROM_NOTHING = 200
MAX_FROM_PLAIN = 500
# Larger steps start from the plain one only where it is not far above the budget.
NOT_FAR = 1.25
EVALUATIONS = 6_000
SHAKEN = 4
MAX_CAREFUL = 700
# Memory for what nested recomputation keeps, in parts of the least possible.
OUTLINES = (1.0, 1.25, 1.6, 2.0, 3.0, 4.0)
NUM_OUTLINES = 2


@dataclass(frozen=True)
class Found:
    """A schedule and what the simulator says about it."""

    schedule: Schedule
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class View:
    """The graph with its backward in the order that suits one segmentation.

    Attributes:
        graph: with operations renumbered.
        old_ids: the original id of each operation.
        segments: with their options.
        crossing: (delayed operation, buffer that waits for it): the chain does not see that it is
            read there, and seeds drop it until then.
    """

    graph: StepGraph
    old_ids: list[int]
    segments: list[Segment]
    crossing: tuple[tuple[int, int], ...] = ()

    @cached_property
    def facts(self) -> Facts:
        """About the graph."""
        return Facts(self.graph)

    @cached_property
    def carry(self) -> npt.NDArray[np.int64]:
        """See `carries`."""
        return carries(self.segments, self.facts.size)

    def seed(self, order: Sequence[int]) -> Retention:
        """Return the intervals behind an order, without what would wait for delayed operations."""
        retention = Retention.from_order(self.graph, order, self.facts)
        for position, buffer in self.crossing:
            new = retention.without_gap(buffer, position)
            if new is not None:
                retention.set_intervals(buffer, new)
        return retention


# Seconds of recomputation, which seed, and the seed.
Started = tuple[float, int, View, Retention]


class LocalSearch:
    """Segments one graph and finds schedules for any number of budgets."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        self._pinned_bytes = sum(
            graph.buffers[b].bytes for b in graph.outputs
            if graph.buffers[b].kind is BufferKind.OUTPUT
        )
        self.views: list[View] = []
        facts = Facts(graph)
        for max_segments in _granularities(graph.num_forward):
            cuts = cut_points(facts, max_segments)
            if self.views and len(cuts) + 1 == len(self.views[-1].segments):
                continue
            labels = backward_labels(facts, cuts)
            reordered, old_ids = reorder_backward(graph, labels)
            labels.sort(reverse=True)
            segments = build_segments(Facts(reordered), cuts, labels)
            self.views.append(View(reordered, old_ids, segments))
            late = delayed(reordered) if len(self.views) == 1 else None  # one such view will do
            if late is not None:
                self.views.append(_late_view(late, old_ids, cuts, labels))

    def fastest(self, budget_bytes: int) -> list[Found]:
        """Return schedules within a budget, the last one the fastest; empty if none was found."""
        started: list[Started] = []
        for view in self.views:
            for retention in self._seeds(view, budget_bytes):
                effort = Effort(0)
                effort.more(retention, EVALUATIONS)
                if repair(retention, budget_bytes, effort):
                    improve(retention, budget_bytes, effort)
                    started.append((retention.total_extra_seconds, len(started), view, retention))
        return self._shaken(started, budget_bytes)

    def fastest_small(self, budget_bytes: int, smallest: Iterable[Schedule]) -> list[Found]:
        """Do the same for a tight budget, from seeds that are brought down with more patience.

        Args:
            budget_bytes: for what the schedule allocates.
            smallest: schedules with small peaks, to start from as well.
        """
        seeds = [(v, r) for v in self.views for r in self.small_seeds(v, with_plain=True)]
        seeds.extend(self._seed_of(schedule) for schedule in smallest)
        started: list[Started] = []
        for view, retention in seeds:
            effort = Effort(0)
            effort.more(retention, 2 * EVALUATIONS)
            lower(retention, effort, budget_bytes)
            if retention.peak_bytes <= budget_bytes:
                effort.more(retention, EVALUATIONS)
                improve(retention, budget_bytes, effort)
                started.append((retention.total_extra_seconds, len(started), view, retention))
        return self._shaken(started, budget_bytes)

    def _seed_of(self, schedule: Schedule) -> tuple[View, Retention]:
        """Return a schedule as intervals, first runs numbered as they come."""
        order = [i.target for i in schedule.instructions if i.action is Action.RUN]
        old_ids = list(dict.fromkeys(order))
        new_ids = {old: new for new, old in enumerate(old_ids)}
        computations = self.graph.computations
        operations = tuple(replace_id(computations[old], new_ids[old]) for old in old_ids)
        view = View(replace(self.graph, operations=operations), old_ids, [])
        return view, view.seed([new_ids[old] for old in order])

    def _shaken(self, started: list[Started], budget_bytes: int) -> list[Found]:
        """Return the schedules behind the fastest seeds, after random moves."""
        shaken = SHAKEN if len(self.graph.computations) <= MAX_CAREFUL else 1
        found = []
        for _, _, view, retention in sorted(started, key=lambda s: s[:2])[:shaken]:
            effort = Effort(0)
            effort.more(retention, EVALUATIONS)
            shake(retention, budget_bytes, effort)
            found.append(judged(view, retention))
        return sorted((f for f in found if f.peak_bytes <= budget_bytes), key=lambda f: -f.seconds)

    def _seeds(self, view: View, budget_bytes: int) -> Iterator[Retention]:
        seen: set[tuple[int, ...]] = set()
        num = len(view.graph.computations)
        chain = self._chain(view, int(budget_bytes * max(SCALES)), budget_bytes)
        smallest = chain.smallest_level()
        # Fewer of each in larger graphs: planning 1,000 operations takes about 2 s.
        for scale in SCALES[:: 1 if num <= MAX_CAREFUL else 2 if num <= 4 * MAX_CAREFUL else 7]:
            level = chain.level_within(int(budget_bytes * scale) - self._pinned_bytes)
            if smallest is not None and level >= smallest:
                order = tuple(chain.order(level))
                if order not in seen:
                    seen.add(order)
                    yield view.seed(order)
        if num <= MAX_FROM_PLAIN or view is self.views[0]:
            plain = view.seed(range(num))
            if num <= MAX_FROM_PLAIN or plain.peak_bytes <= NOT_FAR * budget_bytes:
                yield plain
        if num <= MAX_FROM_NOTHING:
            yield Retention.from_nothing(view.graph, False, view.facts)

    def _chain(self, view: View, most_bytes: int, budget_bytes: int) -> Chain:
        """Return the table up to `most_bytes`, with `CHAIN_LEVELS` levels to `budget_bytes`."""
        budget_bytes = max(1, budget_bytes - self._pinned_bytes)
        most_bytes = max(budget_bytes, most_bytes - self._pinned_bytes)
        num_levels = CHAIN_LEVELS * most_bytes // budget_bytes
        return Chain(
            view.segments, budget_bytes * num_levels // CHAIN_LEVELS, view.carry, num_levels
        )

    def small_seeds(self, view: View, with_plain: bool) -> Iterator[Retention]:
        """Yield seeds with small peaks.

        Args:
            view: of which.
            with_plain: begin with the plain step.
        """
        plain = view.seed(range(len(view.graph.computations)))
        if with_plain:
            yield plain
        chain = self._chain(view, plain.peak_bytes, plain.peak_bytes)
        level = chain.smallest_level()
        if level is not None:
            needed = int((level + 1) * chain.level_bytes) + self._pinned_bytes
            chain = self._chain(view, needed, needed)
            level = chain.smallest_level()
            if level is not None:
                yield view.seed(chain.order(level))
        yield from self._outlines(view)
        if len(view.graph.computations) <= MAX_FROM_NOTHING:
            yield Retention.from_nothing(view.graph, True, view.facts)
            yield Retention.from_nothing(view.graph, False, view.facts)

    def _outlines(self, view: View) -> list[Retention]:
        """Return seeds that nest recomputation deeply, the ones with the smallest peaks.

        Where one segment needs much memory, the chain sees no reason to spare it in the others. So
        these orders come from a chain in which a segment needs nothing but what it keeps.
        """
        bare = [
            replace(
                segment, plain_peak_bytes=0, pile_bytes=0,
                options=tuple(
                    replace(o, forward_peak_bytes=o.kept_bytes, backward_peak_bytes=o.kept_bytes)
                    for o in segment.options
                ),
            )
            for segment in view.segments
        ]
        most_bytes = sum(segment.frontier_bytes for segment in view.segments) + 1
        chain = Chain(bare, most_bytes, view.carry, CHAIN_LEVELS)
        least = chain.smallest_level()
        if least is None:
            return []
        orders = {
            tuple(chain.order(level))
            for level in {min(CHAIN_LEVELS, math.ceil(least * part)) for part in OUTLINES}
        }
        seeds = [view.seed(order) for order in sorted(orders)]
        feasible = [seed for seed in seeds if seed.is_feasible]
        return sorted(feasible, key=lambda seed: seed.peak_bytes)[:NUM_OUTLINES]


def _late_view(
    late: Delayed, old_ids: Sequence[int], cuts: Sequence[int], labels: Sequence[int]
) -> View:
    """Return the view of a delayed order; its operations are in the segments they wait for."""
    num = late.graph.num_forward
    late_labels = [labels[late.anchors.get(i, i) - num] for i in late.old_ids[num:]]
    operations = list(late.graph.computations)
    for index, buffer in late.crossing:
        operation = operations[index]
        operations[index] = replace(
            operation,
            reads=tuple(b for b in operation.reads if b != buffer),
            overwrites=tuple(pair for pair in operation.overwrites if pair[1] != buffer),
        )
    without_waits = replace(late.graph, operations=tuple(operations))
    segments = build_segments(Facts(without_waits), cuts, late_labels)
    return View(late.graph, [old_ids[i] for i in late.old_ids], segments, late.crossing)


def _granularities(num_forward: int) -> list[int]:
    if num_forward <= 24:
        return [min(num_forward, 120)]
    return [min(120, num_forward // 4), max(4, min(40, num_forward // 12))]


def judged(view: View, retention: Retention) -> Found:
    """Return the schedule behind intervals, in the original's ids, as the simulator sees it."""
    found = schedule_of(view.graph, retention.order())
    return Found(restore_ids(found.schedule, view.old_ids), found.seconds, found.peak_bytes)


def schedule_of(graph: StepGraph, order: Sequence[int]) -> Found:
    """Return the schedule that runs operations in an order; its forward ends as early as it can."""
    schedule = in_order(graph, order)
    timeline = simulate(graph, schedule)
    return Found(schedule, timeline.seconds, timeline.peak_bytes)


def in_order(graph: StepGraph, order: Sequence[int]) -> Schedule:
    """Return the same schedule, not simulated."""
    order = without_useless_runs(graph, order)
    last = graph.num_forward - 1
    num_forward = order.index(last) + 1 if last >= 0 else 0
    return schedule_from_order(graph, order, num_forward)
