"""Retention intervals on their own: those behind an order of operations, and how they merge.

An interval (s, e) of a buffer: it is made at position s and held until position e is over with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packlight.planner.retention import Retention

Interval = tuple[int, int]


def merged(intervals: list[Interval]) -> list[Interval]:
    """Return intervals in order, those that touch or overlap as one."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def behind_order(retention: Retention, order: Sequence[int]) -> list[list[Interval]]:
    """Return each buffer's intervals where operations run in an order.

    The first run of each operation is its position in the plain step; every further run is a
    recomputation, done before the next first run.
    """
    graph, n = retention.graph, retention.num_positions
    num_forward = min(graph.num_forward, n)
    forward_outputs = set(graph.forward_outputs)
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    seen = [False] * n
    position = 0
    found: list[list[Interval]] = [[] for _ in graph.buffers]

    def close(buffer: int) -> None:
        start, end = made.pop(buffer), last.pop(buffer, -1)
        if buffer in forward_outputs and start < num_forward <= position:
            end = max(end, num_forward)
        if end > start:
            found[buffer].append((start, end))

    for index in order:
        for buffer in retention.reads[index]:
            last[buffer] = position
        for buffer in retention.creates[index]:
            if buffer in made:
                if retention.is_fixed[buffer]:
                    continue  # made once, held throughout
                close(buffer)
            made[buffer] = position
        if not seen[index]:
            seen[index] = True
            position += 1
    for buffer in graph.outputs:
        last[buffer] = n
    for buffer in list(made):
        close(buffer)
    return found


def of_nothing(
    retention: Retention, plain: Retention, drop_gradients: bool
) -> list[list[Interval]]:
    """Return intervals that keep as little as can be: everything is recomputed at every use.

    Args:
        retention: for which they are.
        plain: the plain step's.
        drop_gradients: recompute what the backward made, too.
    """
    graph = retention.graph
    found = [list(intervals) for intervals in plain.intervals]
    for buffer, intervals in enumerate(found):
        is_gradient = retention.maker[buffer] >= graph.num_forward
        if not intervals or (is_gradient and not drop_gradients):
            continue
        start = intervals[0][0]
        if retention.is_fixed[buffer]:
            found[buffer] = [(start, max(intervals[-1][1], retention.num_positions - 1))]
            continue
        until = start + 2 if is_gradient else graph.num_forward
        near = (start, max((u for u in plain.used_at[buffer] if u < until), default=start))
        ends = [(max(due - 1, start), due) for due in retention.due.get(buffer, ())]
        found[buffer] = merged([i for i in (near, *ends) if i[1] > i[0]])
    return found


def shortened(intervals: list[Interval], uses: Sequence[int]) -> list[Interval]:
    """Return intervals that end with a use, without those in which there is none.

    Args:
        intervals: in order.
        uses: where the buffer is read from memory or due, in order.
    """
    new: list[Interval] = []
    for start, end in intervals:
        at = bisect_left(uses, end + 1) - 1
        if at >= 0 and uses[at] > start:
            new.append((start, uses[at]))
    return new


def without_gap(
    intervals: list[Interval], uses: Sequence[int], due: Collection[int], position: int
) -> list[Interval] | None:
    """Return the intervals with a hole around a position, or None where there is no gap.

    The hole reaches from the last use before the position to the next use at or after it; a buffer
    that is next due as an output is made again just before.

    Args:
        intervals: in order.
        uses: where the buffer is read from memory or due, in order.
        due: where it has to be in memory as an output.
        position: where it should not be held.
    """
    for index, (start, end) in enumerate(intervals):
        if start < position <= end:
            at = bisect_left(uses, position)
            before = max(start, uses[at - 1] if at > 0 else start)
            after = uses[at] if at < len(uses) and uses[at] <= end else end
            if after in due:
                after -= 1
                if position > after:
                    return None
            new = intervals[:index]
            if before > start:
                new.append((start, before))
            if after < end:
                new.append((after, end))
            return new + intervals[index + 1 :]
    return None
