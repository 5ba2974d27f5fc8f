"""A way found for a batch of other sizes, run for these: one search for a bucket of shapes.

The same loss on a longer sequence is the same graph with other numbers of bytes, so a schedule of
the one is a schedule of the other. What it holds there `simulate` says. A way is taken where it
fits and either costs no time or makes use of the budget; otherwise it is one for sizes too far
away, and the fastest is looked for anew.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from packlight.capture.whole_step import WholeStep
from packlight.errors import MicrobatchError, ScheduleError, WayError
from packlight.moves.draft import Draft
from packlight.moves.move import Stage
from packlight.search.judge import judged
from packlight.search.plan_way import Moves, WayPlanner
from packlight.search.ready import Ready, ReadyPart
from packlight.step.digest import order_digest, structure_digest

# A way that costs time has to use so much of what the budget leaves for a schedule.
LEAST_USE = 0.6
# So much time does not count.
FREE_SLOWDOWN = 1.01


class Bucket:
    """The ways that were searched for batches which differ in sizes alone."""

    def __init__(self) -> None:
        self._found: list[Ready] = []

    def add(self, ready: Ready) -> None:
        """Remember a way that was searched."""
        self._found.append(ready)

    def way_for(self, planner: WayPlanner) -> Ready | None:
        """Return the fastest of the ways that suits a batch of other sizes, if one does."""
        steps: dict[tuple[Moves, int | None], tuple[Draft, WholeStep]] = {}
        for ready in sorted(self._found, key=lambda ready: ready.way.slowdown):
            found = _fitted(ready, planner, steps)
            if found is not None and _suits(found, planner.request.budget_bytes):
                return found
        return None


def _fitted(
    ready: Ready,
    planner: WayPlanner,
    steps: dict[tuple[Moves, int | None], tuple[Draft, WholeStep]],
) -> Ready | None:
    """Return a way with the same moves and schedules for the planner's batch, if they are its."""
    way = ready.way
    moves = tuple(move for move in way.moves if move.stage is not Stage.LOSS)
    try:
        sizes = Counter(planner.sizes(moves))
    except MicrobatchError:
        return None
    if {part.num_rows: part.count for part in way.parts} != dict(sizes):
        return None
    parts: list[ReadyPart] = []
    for old in ready.parts:
        key = (moves, old.traced.num_rows)
        if key not in steps:
            try:
                draft = planner.draft(moves, old.traced.num_rows)
            except WayError:  # other sizes have other values to approximate
                return None
            steps[key] = draft, planner.completed(draft)
        draft, step = steps[key]
        if order_digest(step.joint.graph) != order_digest(old.step.joint.graph):
            return None
        try:
            plan = judged(old.plan, step, draft)
        except (ScheduleError, IndexError):
            return None
        parts.append(planner.part(draft, step, plan))
    plans = [
        replace(
            saved, plan=part.plan, graph_digest=structure_digest(part.step.joint.graph)
        )
        for saved, part in zip(way.parts, parts, strict=True)
    ]
    memory = planner.memory(planner.draft(moves))
    return planner.bound(replace(way, parts=tuple(plans), memory=memory), parts)


def _suits(ready: Ready, budget_bytes: int | None) -> bool:
    way = ready.way
    if budget_bytes is None:
        return way.slowdown <= FREE_SLOWDOWN
    if way.peak_bytes > budget_bytes:
        return False
    left_bytes = budget_bytes - way.memory.resident_bytes
    used_bytes = max(part.plan.peak_bytes for part in way.parts)
    is_free = way.slowdown <= FREE_SLOWDOWN and all(move.is_free for move in way.moves)
    return is_free or used_bytes >= LEAST_USE * left_bytes

