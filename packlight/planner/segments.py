"""A step cut into segments where little is in memory, each with the ways to run it.

Walking the forward, a cut is made where the live activations shrink to few bytes (skip connections
are carried through, as part of what is live). A backward operation belongs to the segment in which
its gradients become available, unless it reads what an earlier segment holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from packlight.planner.facts import Facts, Segment
from packlight.planner.options import add_options
from packlight.step import Action, Instruction, Operation, Phase, Schedule, StepGraph


def cut_points(facts: Facts, max_segments: int) -> list[int]:
    """Return positions in the forward at which to cut, fewest live bytes first chosen.

    A position is a candidate where the live bytes are a local minimum; the narrowest are taken.
    """
    live = _live_across_forward(facts)
    num = facts.graph.num_forward
    candidates: list[tuple[int, int]] = []
    position = 1
    while position < num:
        end = position
        while end + 1 < num and live[end + 1] == live[position]:
            end += 1
        left = live[position - 1] if position > 1 else float("inf")
        right = live[end + 1] if end + 1 < num else float("inf")
        if live[position] <= left and live[position] <= right:
            candidates.append((live[position], position))
        position = end + 1
    if len(candidates) > max_segments - 1:
        candidates = _spread_out(candidates, max_segments - 1, num)
    return sorted(position for _, position in candidates)


def _spread_out(candidates: list[tuple[int, int]], count: int, num: int) -> list[tuple[int, int]]:
    """Keep the narrowest candidate of each of `count` equal stretches of the forward."""
    best: dict[int, tuple[int, int]] = {}
    for candidate in candidates:
        stretch = candidate[1] * count // num
        if stretch not in best or candidate < best[stretch]:
            best[stretch] = candidate
    return list(best.values())


def _live_across_forward(facts: Facts) -> list[int]:
    """Return for each forward position the bytes made before it that the forward still reads."""
    num = facts.graph.num_forward
    change = [0] * (num + 2)
    last: dict[int, int] = {}
    for position in range(num):
        for buffer in facts.reads[position]:
            last[buffer] = position
    for buffer, end in last.items():
        start = facts.maker[buffer]
        if start >= 0:
            change[start + 1] += facts.size[buffer]
            change[end + 1] -= facts.size[buffer]
    live, total = [], 0
    for position in range(num):
        total += change[position]
        live.append(total)
    return live


def backward_labels(facts: Facts, cuts: Sequence[int]) -> list[int]:
    """Return for each backward operation the segment it belongs to."""
    graph = facts.graph
    segment_of = _segment_of_forward(graph.num_forward, cuts)
    frontier_from = _first_and_last_segment(facts, segment_of)
    label_of_buffer: dict[int, int] = {}
    labels: list[int] = []
    pending: list[int] = []
    top = len(cuts)
    earliest_reader = _first_segment_reading_mutated(graph, segment_of, top)
    kept = {*graph.outputs, *graph.forward_outputs}
    for operation in graph.computations[graph.num_forward :]:
        ready = top
        has_gradient = False
        forward_reads: list[int] = []
        for buffer in facts.reads[operation.id]:
            if buffer in label_of_buffer:
                ready = min(ready, label_of_buffer[buffer])
                has_gradient = True
            elif operation.phase is Phase.UPDATE and buffer in kept:
                pass  # updates wait for the step's results, which stay in memory anyway
            elif 0 <= facts.maker[buffer] < graph.num_forward:
                forward_reads.append(buffer)
        label = min([ready, *(earliest_reader[b] for b in operation.mutates)])
        own = max((segment_of[facts.maker[b]] for b in forward_reads), default=-1)
        # What the forward reads for the last time in an earlier segment is at hand up to there.
        reach = min(
            (max(segment_of[facts.maker[b]], frontier_from[b]) for b in forward_reads), default=top
        )
        if reach < ready:
            label = min(label, reach)
        if not has_gradient and forward_reads:
            label = min(ready, own)
        elif not has_gradient and operation.creates and not forward_reads:
            label = -1  # a constant: belongs to whoever reads it
        labels.append(label)
        if label < 0:
            pending.append(len(labels) - 1)
        else:
            for buffer in operation.creates:
                label_of_buffer[buffer] = label
            for buffer in operation.reads:
                if buffer in earliest_reader:
                    earliest_reader[buffer] = min(earliest_reader[buffer], label)
    readers: dict[int, int] = {}
    for offset, operation in enumerate(graph.computations[graph.num_forward :]):
        for buffer in facts.reads[operation.id]:
            readers[buffer] = max(readers.get(buffer, -1), labels[offset])
    for offset in reversed(pending):
        creates = graph.computations[graph.num_forward + offset].creates
        wanted = max((readers.get(b, -1) for b in creates), default=-1)
        labels[offset] = wanted if wanted >= 0 else top
        for buffer in facts.reads[graph.num_forward + offset]:
            readers[buffer] = max(readers.get(buffer, -1), labels[offset])
    return labels


def _first_segment_reading_mutated(
    graph: StepGraph, segment_of: list[int], top: int
) -> dict[int, int]:
    """Return for each buffer that an update changes the first segment whose forward reads it.

    The update must wait for that segment's backward, which may recompute its forward.
    """
    first = {b: top for o in graph.computations for b in o.mutates}
    for operation in graph.computations[: graph.num_forward]:
        for buffer in operation.reads:
            if buffer in first:
                first[buffer] = min(first[buffer], segment_of[operation.id])
    return first


def _segment_of_forward(num_forward: int, cuts: Sequence[int]) -> list[int]:
    segment_of, segment = [], 0
    for position in range(num_forward):
        while segment < len(cuts) and position >= cuts[segment]:
            segment += 1
        segment_of.append(segment)
    return segment_of


def _first_and_last_segment(facts: Facts, segment_of: list[int]) -> list[int]:
    """Return for each forward buffer the last segment whose forward reads it (-1: none)."""
    last = [-1] * len(facts.size)
    for position in range(facts.graph.num_forward):
        for buffer in facts.reads[position]:
            last[buffer] = max(last[buffer], segment_of[position])
    return last


def reorder_backward(graph: StepGraph, labels: list[int]) -> tuple[StepGraph, list[int]]:
    """Return the graph with its backward sorted by segment, last first, and the old ids."""
    num = graph.num_forward
    backward = sorted(range(len(labels)), key=lambda offset: -labels[offset])
    old_ids = list(range(num)) + [num + offset for offset in backward]
    operations = tuple(replace_id(graph.computations[old], new) for new, old in enumerate(old_ids))
    return replace(graph, operations=operations), old_ids


def replace_id(operation: Operation, new: int) -> Operation:
    """Return an operation under another id."""
    return operation if operation.id == new else replace(operation, id=new)


def restore_ids(schedule: Schedule, old_ids: list[int]) -> Schedule:
    """Return a schedule of a reordered graph in terms of the original's ids."""
    return Schedule(
        tuple(
            Instruction(i.action, old_ids[i.target], i.overwrite)
            if i.action is Action.RUN
            else i
            for i in schedule.instructions
        ),
        schedule.num_forward,
    )


def build_segments(facts: Facts, cuts: Sequence[int], labels: Sequence[int]) -> list[Segment]:
    """Return the segments of a graph whose backward is sorted by label, with their options."""
    graph, num = facts.graph, facts.graph.num_forward
    bounds = [0, *cuts, num]
    last_reader = _last_segment_reading(facts, cuts, labels)
    segments: list[Segment] = []
    by_label: list[list[int]] = [[] for _ in range(len(cuts) + 1)]
    for offset, label in enumerate(labels):
        by_label[label].append(num + offset)
    for index in range(len(cuts) + 1):
        forward = tuple(range(bounds[index], bounds[index + 1]))
        frontier = frozenset(
            b
            for b, last in last_reader.items()
            if facts.maker[b] < bounds[index] and last >= index and b not in facts.pinned
        )
        segments.append(
            Segment(
                forward,
                tuple(by_label[index]),
                frontier,
                sum(facts.size[b] for b in frontier),
                sum(graph.computations[i].seconds for i in forward),
                sum(graph.computations[i].seconds for i in by_label[index]),
            )
        )
    add_options(facts, segments)
    return segments


def _last_segment_reading(
    facts: Facts, cuts: Sequence[int], labels: Sequence[int]
) -> dict[int, int]:
    """Return the last segment whose forward or backward reads each forward buffer."""
    num = facts.graph.num_forward
    segment_of = _segment_of_forward(num, cuts)
    last: dict[int, int] = {}
    for position in range(len(facts.graph.computations)):
        segment = segment_of[position] if position < num else labels[position - num]
        for buffer in facts.reads[position]:
            if 0 <= facts.maker[buffer] < num:
                last[buffer] = max(last.get(buffer, -1), segment)
    return last
