"""Another order of the backward: what would wait long for its reader runs just before it.

A tied embedding's gradient is ready as soon as the loss head's backward is over, and waits in
memory until the embedding's own backward adds to it, last of all. Made late instead, it
is out of the way while the rest of the backward runs, and what it is made from can be
recomputed then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from packlight.planner.segments import replace_id
from packlight.step import StepGraph

# What is delayed waits for at least so many operations, and this share of the backward ...
MIN_OPERATIONS = 16
MIN_WAIT = 1 / 8
# ... and has at least this share of the most bytes that one operation touches.
MIN_BYTES = 1 / 8


@dataclass(frozen=True)
class Delayed:
    """A graph whose backward is in another order.

    Attributes:
        graph: with operations renumbered.
        old_ids: the original id of each operation.
        anchors: delayed operation -> the one before which it runs (original ids).
        crossing: (a delayed operation's new id, a buffer it reads that the backward made earlier).
    """

    graph: StepGraph
    old_ids: list[int]
    anchors: dict[int, int]
    crossing: tuple[tuple[int, int], ...]


def delayed(graph: StepGraph) -> Delayed | None:
    """Return the graph with long waits shortened, or None if there are none."""
    anchors = _anchors(graph)
    if not anchors:
        return None

    def when(index: int) -> tuple[int, bool, int]:
        return (anchors.get(index, index), index not in anchors, index)

    old_ids = sorted(range(len(graph.operations)), key=when)
    operations = tuple(replace_id(graph.operations[old], new) for new, old in enumerate(old_ids))
    made = {b: o.id for o in graph.operations[graph.num_forward :] for b in o.creates}
    crossing = tuple(
        (new, buffer)
        for new, old in enumerate(old_ids) if old in anchors
        for buffer in graph.operations[old].reads
        if buffer in made and made[buffer] not in anchors
    )
    return Delayed(replace(graph, operations=operations), old_ids, anchors, crossing)


def _anchors(graph: StepGraph) -> dict[int, int]:
    """Return for each operation that should be delayed the one before which it then runs."""
    num = len(graph.operations)
    min_wait = max(MIN_OPERATIONS, int(MIN_WAIT * (num - graph.num_forward)))
    size = [0 if b.id in graph.resident else b.bytes for b in graph.buffers]
    touched = (sum(size[b] for b in (*o.touches, *o.creates)) for o in graph.operations)
    min_bytes = max(1, int(MIN_BYTES * max(touched, default=0)))
    kept = {*graph.outputs, *graph.forward_outputs}
    anchors: dict[int, int] = {}
    # Where each buffer is first read, and where first changed, after the operation looked at.
    first_read: dict[int, int] = {}
    first_change: dict[int, int] = {}
    for operation in reversed(graph.operations[graph.num_forward :]):
        if operation.can_recompute and not operation.mutates and kept.isdisjoint(operation.creates):
            until = min(
                [first_read.get(b, num) for b in operation.creates]
                + [first_change.get(b, num) for b in operation.touches]
            )
            is_read = any(b in first_read for b in operation.creates)
            is_large = sum(size[b] for b in operation.creates) >= min_bytes
            if is_read and is_large and until - operation.id >= min_wait:
                anchors[operation.id] = until
        due = anchors.get(operation.id, operation.id)
        for buffer in operation.touches:
            first_read[buffer] = min(first_read.get(buffer, num), due)
        for buffer in operation.mutates:
            first_change[buffer] = due
    return anchors
