"""Schedules from the chain's dynamic program, refined by local moves.

Several segmentations and several sizes of the chain's memory are tried: the chain's own accounting
is coarser than the simulator's, which alone decides what fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from packlight.planner.chain import Chain
from packlight.planner.delay import Delayed, delayed
from packlight.planner.facts import Segment
from packlight.planner.plain import schedule_from_order, without_useless_runs
from packlight.planner.refine import Effort, improve, lower, repair, shake
from packlight.planner.retention import Retention
from packlight.planner.segments import (
    backward_labels,
    build_segments,
    cut_points,
    reorder_backward,
    restore_ids,
)
from packlight.step import Schedule, StepGraph, simulate
from packlight.step.types import BufferKind

CHAIN_LEVELS = 400
SCALES = (1.0, 0.94, 0.97, 0.99, 1.02, 1.04, 1.07, 1.1)
MAX_FROM_NOTHING = 200
MAX_FROM_PLAIN = 500
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

    def seed(self, order: Sequence[int]) -> Retention:
        """Return the intervals behind an order, without what would wait for delayed operations."""
        retention = Retention.from_order(self.graph, order)
        for position, buffer in self.crossing:
            new = retention.without_gap(buffer, position)
            if new is not None:
                retention.set_intervals(buffer, new)
        return retention


class LocalSearch:
    """Segments one graph and finds schedules for any number of budgets."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        self._pinned_bytes = sum(
            graph.buffers[b].bytes for b in graph.outputs
            if graph.buffers[b].kind is BufferKind.OUTPUT
        )
        self.views: list[View] = []
        for max_segments in _granularities(graph.num_forward):
            cuts = cut_points(graph, max_segments)
            if self.views and len(cuts) + 1 == len(self.views[-1].segments):
                continue
            labels = backward_labels(graph, cuts)
            reordered, old_ids = reorder_backward(graph, labels)
            labels.sort(reverse=True)
            segments = build_segments(reordered, cuts, labels)
            self.views.append(View(reordered, old_ids, segments))
            late = delayed(reordered) if len(self.views) == 1 else None  # one such view will do
            if late is not None:
                self.views.append(_late_view(late, old_ids, cuts, labels))

    def fastest(self, budget_bytes: int) -> list[Found]:
        """Return schedules within a budget, the last one the fastest; empty if none was found."""
        started = self._started(lambda view: self._seeds(view, budget_bytes), budget_bytes)
        if not started:
            started = self._started(self._outlines, budget_bytes)
        shaken = SHAKEN if len(self.graph.operations) <= MAX_CAREFUL else 1
        found = []
        for _, _, view, retention in sorted(started, key=lambda s: s[:2])[:shaken]:
            effort = Effort(0)
            effort.more(retention, EVALUATIONS)
            shake(retention, budget_bytes, effort)
            found.append(judged(view, retention))
        return sorted((f for f in found if f.peak_bytes <= budget_bytes), key=lambda f: -f.seconds)

    def _started(
        self, seeds: Callable[[View], Iterable[Retention]], budget_bytes: int
    ) -> list[tuple[float, int, View, Retention]]:
        """Return the seeds that could be brought within a budget, each made faster there."""
        started: list[tuple[float, int, View, Retention]] = []
        for view in self.views:
            for retention in seeds(view):
                effort = Effort(0)
                effort.more(retention, EVALUATIONS)
                if repair(retention, budget_bytes, effort):
                    improve(retention, budget_bytes, effort)
                    seconds = retention.total_extra_seconds
                    started.append((seconds, len(started), view, retention))
        return started

    def _seeds(self, view: View, budget_bytes: int) -> Iterator[Retention]:
        seen: set[tuple[int, ...]] = set()
        num = len(view.graph.operations)
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
        if num <= MAX_FROM_PLAIN:
            yield view.seed(range(num))
        if num <= MAX_FROM_NOTHING:
            yield Retention.from_nothing(view.graph, drop_gradients=False)

    def _chain(self, view: View, most_bytes: int, budget_bytes: int) -> Chain:
        """Return the table up to `most_bytes`, with `CHAIN_LEVELS` levels to `budget_bytes`."""
        resident = view.graph.resident
        sizes = [0 if b.id in resident else b.bytes for b in view.graph.buffers]
        budget_bytes = max(1, budget_bytes - self._pinned_bytes)
        most_bytes = max(budget_bytes, most_bytes - self._pinned_bytes)
        num_levels = CHAIN_LEVELS * most_bytes // budget_bytes
        return Chain(view.segments, budget_bytes * num_levels // CHAIN_LEVELS, sizes, num_levels)

    def smallest(self, plain_peak_bytes: int) -> list[Found]:
        """Return schedules with small peaks: as low as drops could bring them, then made faster."""
        lowered: list[tuple[int, int, View, Retention]] = []
        for view in self.views:
            for retention in self._small_seeds(view, plain_peak_bytes):
                effort = Effort(0)
                effort.more(retention, 2 * EVALUATIONS)
                lower(retention, effort)
                if retention.is_feasible:
                    lowered.append((retention.peak_bytes, len(lowered), view, retention))
        found = [judged(view, retention) for _, _, view, retention in lowered]
        if not found:
            return []
        _, _, view, retention = min(lowered, key=lambda item: item[:2])
        budget_bytes = retention.peak_bytes
        effort = Effort(0)
        effort.more(retention, EVALUATIONS)
        improve(retention, budget_bytes, effort)
        shake(retention, budget_bytes, effort)
        return [*found, judged(view, retention)]

    def _small_seeds(self, view: View, plain_peak_bytes: int) -> Iterator[Retention]:
        num = len(view.graph.operations)
        yield view.seed(range(num))
        chain = self._chain(view, plain_peak_bytes, plain_peak_bytes)
        level = chain.smallest_level()
        if level is not None:
            needed = int((level + 1) * chain.level_bytes) + self._pinned_bytes
            chain = self._chain(view, needed, needed)
            level = chain.smallest_level()
            if level is not None:
                yield view.seed(chain.order(level))
        yield from self._outlines(view)
        if num <= MAX_FROM_NOTHING:
            yield Retention.from_nothing(view.graph, drop_gradients=True)
            yield Retention.from_nothing(view.graph, drop_gradients=False)


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
        resident = view.graph.resident
        sizes = [0 if b.id in resident else b.bytes for b in view.graph.buffers]
        most_bytes = sum(segment.frontier_bytes for segment in view.segments) + 1
        chain = Chain(bare, most_bytes, sizes, CHAIN_LEVELS)
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
    operations = list(late.graph.operations)
    for index, buffer in late.crossing:
        operation = operations[index]
        operations[index] = replace(
            operation,
            reads=tuple(b for b in operation.reads if b != buffer),
            overwrites=tuple(pair for pair in operation.overwrites if pair[1] != buffer),
        )
    without_waits = replace(late.graph, operations=tuple(operations))
    segments = build_segments(without_waits, cuts, late_labels)
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
    order = without_useless_runs(graph, order)
    last = graph.num_forward - 1
    num_forward = order.index(last) + 1 if last >= 0 else 0
    schedule = schedule_from_order(graph, order, num_forward)
    timeline = simulate(graph, schedule)
    return Found(schedule, timeline.seconds, timeline.peak_bytes)
