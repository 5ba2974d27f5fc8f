"""The smallest peak: a question about bytes alone, answered without a look at seconds.

So the smallest budget that an error names is the same in every process, whatever budget was asked
for and however long operations took when they were measured. Drops bring many schedules down for a
while, the lowest of them further, and the lowest of those again: successive halving (Jamieson and
Talwalkar 2016).

Where the search weighs what a drop costs, two stand-ins take the place of seconds: every operation
the same, and half of that by the bytes that it touches; what gets lower with either counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace

from packlight.planner.facts import Facts
from packlight.planner.plain import schedule_from_order
from packlight.planner.prove import Small, is_small
from packlight.planner.refine import Effort, lower
from packlight.planner.retention import Retention
from packlight.planner.search import LocalSearch, View, in_order
from packlight.planner.segments import restore_ids
from packlight.step import Schedule, StepGraph, simulate
from packlight.step.digest import structure_digest

# Evaluations of each that is left, and how many of them go on.
ROUNDS = ((500, 16), (1_500, 6), (4_000, 3), (24_000, 2))

# Instructions of all schedules that are kept: about 40 MB.
MAX_KEPT = 400_000

# Peak, which seed, and the seed.
Lowered = tuple[int, int, View, Retention]


# What was found for steps, by what decides about bytes; the latest one is last.
_found: dict[str, list[Schedule]] = {}


def smallest_schedules(graph: StepGraph) -> list[Schedule]:
    """Return schedules with small peaks, the one with the smallest that was found first.

    Whoever is told the smallest budget asks for it next, so answers are kept; one that is kept is
    the one that would be found.

    Args:
        graph: the step, free of transfers; its seconds are not looked at.
    """
    key = structure_digest(graph)
    known = _found.pop(key, None)
    _found[key] = schedules = _searched(graph) if known is None else known
    kept = 0
    for older in list(reversed(_found)):
        kept += sum(len(schedule.instructions) for schedule in _found[older])
        if kept > MAX_KEPT:
            del _found[older]
    return list(schedules)


def _searched(graph: StepGraph) -> list[Schedule]:
    facts = Facts(graph)
    left: Iterable[tuple[int, View, Retention]] = (
        (number, *seed) for number, seed in enumerate(_seeds(graph))
    )
    for evaluations, most in ROUNDS:
        lowered: list[Lowered] = []
        for number, view, retention in left:
            _lower(retention, evaluations, facts.least_peak_bytes)
            if retention.is_feasible:
                lowered.append((retention.peak_bytes, number, view, retention))
                lowered = heapq.nsmallest(most, lowered, key=lambda item: item[:2])
                if lowered[0][0] <= facts.least_peak_bytes:
                    break
        left = [item[1:] for item in lowered]
    found = [schedule_from_order(graph, range(len(graph.computations)), graph.num_forward)]
    for _, _, view, retention in lowered:
        order = in_order(view.graph, retention.order())
        found.append(restore_ids(order, view.old_ids))
    if is_small(graph):
        found.extend(Small(next(priced(graph))).lower(found))
    return sorted(found, key=lambda schedule: simulate(graph, schedule).peak_bytes)


def low_schedule(local: LocalSearch) -> Schedule:
    """Return a schedule with a small peak, soon found: where another search starts, not its answer.

    Args:
        local: of the step, whose seconds count.
    """
    lowest: tuple[int, View, Retention] | None = None
    for view in local.views:
        for retention in local.small_seeds(view, with_plain=False):
            _lower(retention, ROUNDS[0][0], 0)
            if retention.is_feasible and (lowest is None or retention.peak_bytes < lowest[0]):
                lowest = retention.peak_bytes, view, retention
    if lowest is None:
        return schedule_from_order(
            local.graph, range(len(local.graph.computations)), local.graph.num_forward
        )
    _, view, retention = lowest
    return restore_ids(in_order(view.graph, retention.order()), view.old_ids)


def priced(graph: StepGraph) -> Iterator[StepGraph]:
    """Yield the graph with each stand-in for its seconds; a step takes one second with each."""
    size, num = Facts(graph).size, len(graph.computations)
    touched = [sum(size[b] for b in {*o.touches, *o.creates}) for o in graph.computations]
    total = max(1, sum(touched))
    for share in (0.0, 0.5):
        computations = (
            replace(o, seconds=(1 - share) / num + share * mine / total)
            for o, mine in zip(graph.computations, touched, strict=True)
        )
        transfers = (
            replace(o, seconds=graph.buffers[o.moved].bytes / total) for o in graph.transfers
        )
        yield replace(graph, operations=(*computations, *transfers))


def _seeds(graph: StepGraph) -> Iterator[tuple[View, Retention]]:
    for priced_graph in priced(graph):
        local = LocalSearch(priced_graph)
        seen: list[list[int]] = []
        for view in local.views:
            is_new = view.old_ids not in seen
            seen.append(view.old_ids)
            for retention in local.small_seeds(view, with_plain=is_new):
                yield view, retention


def _lower(retention: Retention, evaluations: int, floor_bytes: int) -> None:
    effort = Effort(0)
    effort.more(retention, evaluations)
    lower(retention, effort, floor_bytes)
