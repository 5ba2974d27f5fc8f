"""A step cut into segments where little is in memory, each with the ways to run it.

Walking the forward, a cut is made where the live activations shrink to few bytes (skip connections
are carried through, as part of what is live). A backward operation belongs to the segment in which
its gradients become available, unless it reads what an earlier segment holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from packlight.step import Instruction, Operation, Schedule, StepGraph

MAX_ENUMERATED = 8
MAX_OPTIONS = 10
SMALL_FRACTION = 0.01


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a segment: what it keeps from its forward for its backward.

    Attributes:
        kept: buffers made by the segment that stay in memory; others are recomputed.
        kept_bytes: their size together with the segment's output frontier.
        extra_seconds: recomputation in the segment's backward.
        forward_peak_bytes: most that the forward adds while keeping these.
        backward_peak_bytes: most in memory during the backward: kept, recomputed, gradients.
        backward_order: the backward's operations and the recomputations between them.
    """

    kept: frozenset[int]
    kept_bytes: int
    extra_seconds: float
    forward_peak_bytes: int
    backward_peak_bytes: int
    backward_order: tuple[int, ...]


@dataclass
class Segment:
    """Consecutive forward operations and the backward operations that belong to them.

    Attributes:
        forward, backward: operation ids in order.
        frontier: buffers made before the segment that it or a later one reads.
        frontier_bytes: their size.
        forward_seconds, backward_seconds: without recomputation.
        plain_peak_bytes: most that the forward adds while keeping nothing but its output frontier.
        pile_bytes: gradients that are in memory when the segment's backward starts.
        options: a Pareto front, largest kept_bytes first.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    frontier: frozenset[int]
    frontier_bytes: int
    forward_seconds: float
    backward_seconds: float
    plain_peak_bytes: int = 0
    pile_bytes: int = 0
    options: tuple[Option, ...] = field(default=())


@dataclass(frozen=True)
class _Facts:
    """Arrays about a graph that every function here needs."""

    graph: StepGraph
    size: list[int]
    reads: list[tuple[int, ...]]
    maker: list[int]
    pinned: frozenset[int]

    @classmethod
    def of(cls, graph: StepGraph) -> _Facts:
        resident = [b.kind.is_resident for b in graph.buffers]
        size = [0 if resident[b.id] else b.bytes for b in graph.buffers]
        reads = [tuple(b for b in o.reads if not resident[b]) for o in graph.operations]
        maker = [-1] * len(graph.buffers)
        for o in graph.operations:
            for b in o.creates:
                maker[b] = o.id
        pinned = frozenset(b for b in graph.outputs if 0 <= maker[b] < graph.num_forward)
        return cls(graph, size, reads, maker, pinned)


def cut_points(graph: StepGraph, max_segments: int) -> list[int]:
    """Return positions in the forward at which to cut, fewest live bytes first chosen.

    A position is a candidate where the live bytes are a local minimum; the narrowest are taken.
    """
    facts = _Facts.of(graph)
    live = _live_across_forward(facts)
    num = graph.num_forward
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


def _live_across_forward(facts: _Facts) -> list[int]:
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


def backward_labels(graph: StepGraph, cuts: Sequence[int]) -> list[int]:
    """Return for each backward operation the segment it belongs to."""
    facts = _Facts.of(graph)
    segment_of = _segment_of_forward(graph.num_forward, cuts)
    frontier_from = _first_and_last_segment(facts, segment_of)
    label_of_buffer: dict[int, int] = {}
    labels: list[int] = []
    pending: list[int] = []
    top = len(cuts)
    for operation in graph.operations[graph.num_forward :]:
        ready = top
        has_gradient = False
        forward_reads: list[int] = []
        for buffer in facts.reads[operation.id]:
            if buffer in label_of_buffer:
                ready = min(ready, label_of_buffer[buffer])
                has_gradient = True
            elif 0 <= facts.maker[buffer] < graph.num_forward:
                forward_reads.append(buffer)
        label = ready
        own = max((segment_of[facts.maker[b]] for b in forward_reads), default=-1)
        in_reach = all(
            segment_of[facts.maker[b]] >= ready or frontier_from[b] >= ready for b in forward_reads
        )
        if forward_reads and not in_reach:
            label = min(ready, own)
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
    readers: dict[int, int] = {}
    for offset, operation in enumerate(graph.operations[graph.num_forward :]):
        for buffer in facts.reads[operation.id]:
            readers[buffer] = max(readers.get(buffer, -1), labels[offset])
    for offset in reversed(pending):
        creates = graph.operations[graph.num_forward + offset].creates
        wanted = max((readers.get(b, -1) for b in creates), default=-1)
        labels[offset] = wanted if wanted >= 0 else top
        for buffer in facts.reads[graph.num_forward + offset]:
            readers[buffer] = max(readers.get(buffer, -1), labels[offset])
    return labels


def _segment_of_forward(num_forward: int, cuts: Sequence[int]) -> list[int]:
    segment_of, segment = [], 0
    for position in range(num_forward):
        while segment < len(cuts) and position >= cuts[segment]:
            segment += 1
        segment_of.append(segment)
    return segment_of


def _first_and_last_segment(facts: _Facts, segment_of: list[int]) -> list[int]:
    """Return for each forward buffer the last segment whose forward reads it (-1: none)."""
    last = [-1] * len(facts.size)
    for position in range(facts.graph.num_forward):
        for buffer in facts.reads[position]:
            last[buffer] = max(last[buffer], segment_of[position])
    return last


def reorder_backward(graph: StepGraph, labels: list[int]) -> tuple[StepGraph, list[int]]:
    """Return the graph with its backward sorted by segment, last first, and the old id of each operation."""
    num = graph.num_forward
    backward = sorted(range(len(labels)), key=lambda offset: -labels[offset])
    old_ids = list(range(num)) + [num + offset for offset in backward]
    operations = tuple(
        replace_id(graph.operations[old], new) for new, old in enumerate(old_ids)
    )
    return replace(graph, operations=operations), old_ids


def replace_id(operation: Operation, new: int) -> Operation:
    """Return an operation under another id."""
    return operation if operation.id == new else replace(operation, id=new)


def restore_ids(schedule: Schedule, old_ids: list[int]) -> Schedule:
    """Return a schedule of a reordered graph in terms of the original's ids."""
    from packlight.step import Action

    return Schedule(
        tuple(
            Instruction(i.action, old_ids[i.target], i.overwrite)
            if i.action is Action.COMPUTE else i
            for i in schedule.instructions
        ),
        schedule.num_forward,
    )


def build_segments(graph: StepGraph, cuts: Sequence[int], labels: Sequence[int]) -> list[Segment]:
    """Return the segments of a graph whose backward is sorted by label, with their options."""
    facts = _Facts.of(graph)
    num = graph.num_forward
    bounds = [0, *cuts, num]
    last_reader = _last_segment_reading(facts, cuts, labels)
    segments: list[Segment] = []
    by_label: list[list[int]] = [[] for _ in range(len(cuts) + 1)]
    for offset, label in enumerate(labels):
        by_label[label].append(num + offset)
    for index in range(len(cuts) + 1):
        forward = tuple(range(bounds[index], bounds[index + 1]))
        frontier = frozenset(
            b for b, last in last_reader.items()
            if facts.maker[b] < bounds[index] and last >= index and b not in facts.pinned
        )
        segments.append(
            Segment(
                forward, tuple(by_label[index]), frontier,
                sum(facts.size[b] for b in frontier),
                sum(graph.operations[i].seconds for i in forward),
                sum(graph.operations[i].seconds for i in by_label[index]),
            )
        )
    _add_options(facts, segments)
    return segments


def _last_segment_reading(
    facts: _Facts, cuts: Sequence[int], labels: Sequence[int]
) -> dict[int, int]:
    """Return the last segment whose forward or backward reads each forward buffer."""
    num = facts.graph.num_forward
    segment_of = _segment_of_forward(num, cuts)
    last: dict[int, int] = {}
    for position in range(len(facts.graph.operations)):
        segment = segment_of[position] if position < num else labels[position - num]
        for buffer in facts.reads[position]:
            if 0 <= facts.maker[buffer] < num:
                last[buffer] = max(last.get(buffer, -1), segment)
    return last


# ---------------------------------------------------------------------------------------------
# Options of a segment


def _add_options(facts: _Facts, segments: list[Segment]) -> None:
    pile = 0
    known: dict[object, tuple[dict[int, int], tuple[int, ...], int, list[Option]]] = {}
    for index in reversed(range(len(segments))):
        segment = segments[index]
        output = segments[index + 1].frontier if index + 1 < len(segments) else frozenset()
        runner = _Runner(facts, segment, output, pile)
        segment.pile_bytes = pile
        segment.plain_peak_bytes = runner.forward_peak(frozenset())
        key = runner.signature()
        places = (*segment.forward, *segment.backward)
        if key not in known:
            names = {local: buffer for buffer, local in runner.local.items()}
            known[key] = (names, places, pile, runner.options())
        segment.options = tuple(
            _renamed(option, known[key], runner.local, places, pile) for option in known[key][3]
        )
        pile = runner.pile_after


def _renamed(
    option: Option,
    known: tuple[dict[int, int], tuple[int, ...], int, list[Option]],
    local: dict[int, int],
    places: tuple[int, ...],
    pile: int,
) -> Option:
    """Return an option found for one segment in the ids of an equal one."""
    names, old_places, old_pile, _ = known
    if old_places == places:
        return option
    buffer_of = {number: buffer for buffer, number in local.items()}
    old_local = {buffer: number for number, buffer in names.items()}
    operation_of = dict(zip(old_places, places, strict=True))
    return replace(
        option,
        kept=frozenset(buffer_of[old_local[b]] for b in option.kept),
        backward_peak_bytes=option.backward_peak_bytes - old_pile + pile,
        backward_order=tuple(operation_of[i] for i in option.backward_order),
    )


class _Runner:
    """Runs one segment in the mind, under different choices of what to keep."""

    def __init__(
        self, facts: _Facts, segment: Segment, output: frozenset[int], pile: int
    ) -> None:
        self.facts, self.segment, self.output, self.pile = facts, segment, output, pile
        operations = facts.graph.operations
        self.made = [b for i in segment.forward for b in operations[i].creates]
        mine = set(self.made)
        # Names that are equal in equal segments.
        self.local: dict[int, int] = {}
        for i in (*segment.forward, *segment.backward):
            for b in (*facts.reads[i], *operations[i].creates):
                self.local.setdefault(b, len(self.local))
        needed: dict[int, None] = {}
        for i in segment.backward:
            for b in facts.reads[i]:
                if b in mine:
                    needed.setdefault(b)
        self.needed = list(needed)
        self.pile_after = self._pile_after()

    def signature(self) -> object:
        operations, local, size = self.facts.graph.operations, self.local, self.facts.size
        return (
            len(self.segment.forward),
            tuple(
                (operations[i].name, operations[i].seconds, operations[i].workspace_bytes,
                 tuple(local[b] for b in self.facts.reads[i]),
                 tuple((local[b], size[b], b in self.output) for b in operations[i].creates),
                 tuple(operations[i].overwrites != () for _ in (0,)))
                for i in (*self.segment.forward, *self.segment.backward)
            ),
            tuple(sorted(local[b] for b in self.segment.frontier if b in local)),
        )

    def options(self) -> list[Option]:
        size = self.facts.size
        total = sum(size[b] for b in self.needed)
        fixed = frozenset(
            b for b in self.needed
            if size[b] <= SMALL_FRACTION * total
            or not self.facts.graph.operations[self.facts.maker[b]].can_recompute
        )
        free = [b for b in self.needed if b not in fixed and b not in self.output]
        if len(free) <= MAX_ENUMERATED:
            subsets = [
                frozenset(kept)
                for count in range(len(free) + 1)
                for kept in itertools.combinations(free, count)
            ]
            found = [self.run(fixed | kept) for kept in subsets]
        else:
            found = self._greedy_front(fixed, free)
        found.append(self.run(frozenset()))
        return _pareto(found)

    def _greedy_front(self, fixed: frozenset[int], free: list[int]) -> list[Option]:
        """Drop one buffer after the other, the cheapest second per byte first."""
        kept = fixed | frozenset(free)
        found = [self.run(kept)]
        remaining = list(free)
        while remaining:
            trials = remaining
            if len(remaining) > 24:  # look at the most promising only
                seconds = self.facts.graph.operations
                trials = sorted(
                    remaining,
                    key=lambda b: seconds[self.facts.maker[b]].seconds / max(1, self.facts.size[b]),
                )[:24]
            best: tuple[float, int, Option] | None = None
            for buffer in trials:
                option = self.run(kept - {buffer})
                rate = (option.extra_seconds - found[-1].extra_seconds) / max(
                    1, self.facts.size[buffer]
                )
                if best is None or (rate, buffer) < best[:2]:
                    best = (rate, buffer, option)
            assert best is not None
            kept = kept - {best[1]}
            remaining.remove(best[1])
            found.append(best[2])
        return found

    def run(self, kept: frozenset[int]) -> Option:
        """Return what keeping exactly these buffers costs."""
        size = self.facts.size
        order, extra, backward_peak = self._backward(kept)
        kept_bytes = sum(size[b] for b in kept | self.output) - sum(
            size[b] for b in self.output & self.segment.frontier
        )
        forward_peak = self.forward_peak(kept)
        return Option(kept, kept_bytes, extra, forward_peak, backward_peak, tuple(order))

    def forward_peak(self, kept: frozenset[int]) -> int:
        """Return the most that the forward adds to its input frontier while keeping some buffers."""
        facts, segment = self.facts, self.segment
        operations, size = facts.graph.operations, facts.size
        last: dict[int, int] = {}
        for i in segment.forward:
            for b in facts.reads[i]:
                last[b] = i
        stay = kept | self.output
        live = peak = 0
        mine = set(self.made)
        for i in segment.forward:
            operation = operations[i]
            growth = sum(size[b] for b in operation.creates if b not in facts.pinned)
            during = growth + operation.workspace_bytes
            for created, victim in operation.overwrites:
                if last.get(victim) == i and victim in mine and victim not in stay:
                    during -= size[created]
                    break
            peak = max(peak, live + during)
            live += growth
            for b in {*operation.creates, *facts.reads[i]}:
                if b in mine and b not in stay and last.get(b, i) == i and b not in facts.pinned:
                    live -= size[b]
        return peak

    def _backward(self, kept: frozenset[int]) -> tuple[list[int], float, int]:
        facts, segment = self.facts, self.segment
        operations, size, maker = facts.graph.operations, facts.size, facts.maker
        mine = set(self.made)
        present = {b for b in kept | self.output if b in mine}
        # Order: each backward operation after the recomputations that it needs.
        order: list[int] = []
        have = set(present)
        extra = 0.0
        for i in segment.backward:
            stack = [b for b in facts.reads[i] if b in mine and b not in have]
            again: set[int] = set()
            while stack:
                b = stack.pop()
                if b in have or maker[b] in again or not operations[maker[b]].can_recompute:
                    continue  # (what runs only once stays in memory for whoever reads it again)
                again.add(maker[b])
                stack.extend(x for x in facts.reads[maker[b]] if x in mine and x not in have)
            for j in sorted(again):
                order.append(j)
                extra += operations[j].seconds
                have.update(operations[j].creates)
            order.append(i)
        last: dict[int, int] = {}
        for step, i in enumerate(order):
            for b in facts.reads[i]:
                last[b] = step
        later = self._read_later
        live = self.pile + sum(size[b] for b in present if b in last)
        peak = live
        for step, i in enumerate(order):
            operation = operations[i]
            growth = sum(
                size[b] for b in operation.creates if b not in facts.pinned and b not in present
            )
            during = growth + operation.workspace_bytes
            for created, victim in operation.overwrites:
                if last.get(victim) == step and not later(victim):
                    if victim in mine or maker[victim] >= facts.graph.num_forward:
                        during -= size[created]
                        break
            peak = max(peak, live + during)
            live += growth
            for b in {*operation.creates, *facts.reads[i]}:
                if last.get(b, step) != step or later(b) or b in facts.pinned:
                    continue
                is_gradient = maker[b] >= facts.graph.num_forward
                if is_gradient or b in mine:
                    if b in present and b not in last:
                        continue
                    live -= size[b]
        return order, extra, peak

    def _read_later(self, buffer: int) -> bool:
        """Whether a gradient buffer outlives this segment's backward."""
        if self.facts.maker[buffer] < self.facts.graph.num_forward:
            return False
        return buffer in self._outliving

    def _pile_after(self) -> int:
        facts, segment = self.facts, self.segment
        last_backward = segment.backward[-1] if segment.backward else -1
        outputs = set(facts.graph.outputs)
        self._outliving = set()
        readers = _readers(facts)
        for i in segment.backward:
            for b in (*facts.graph.operations[i].creates, *facts.reads[i]):
                if facts.maker[b] >= facts.graph.num_forward:
                    if b in outputs or readers.get(b, -1) > last_backward:
                        self._outliving.add(b)
        touched = {
            b for i in segment.backward
            for b in (*facts.graph.operations[i].creates, *facts.reads[i])
            if facts.maker[b] >= facts.graph.num_forward
        }
        created = {b for i in segment.backward for b in facts.graph.operations[i].creates}
        pile = self.pile
        for b in touched:
            if b in created and b in self._outliving:
                pile += facts.size[b]
            elif b not in created and b not in self._outliving:
                pile -= facts.size[b]
        return pile


_READERS: dict[int, tuple[StepGraph, dict[int, int]]] = {}


def _readers(facts: _Facts) -> dict[int, int]:
    """Return the last operation that reads each buffer (remembered for the latest graph only)."""
    known = _READERS.get(0)
    if known is None or known[0] is not facts.graph:
        last: dict[int, int] = {}
        for i, reads in enumerate(facts.reads):
            for b in reads:
                last[b] = i
        _READERS[0] = known = (facts.graph, last)
    return known[1]


def _pareto(options: list[Option]) -> list[Option]:
    """Return options that no other beats in both bytes kept and seconds, at most MAX_OPTIONS."""
    ordered = sorted(
        options, key=lambda o: (o.kept_bytes, o.extra_seconds, o.backward_peak_bytes, sorted(o.kept))
    )
    front: list[Option] = []
    for option in ordered:
        if not front or option.extra_seconds < front[-1].extra_seconds - 1e-12:
            front.append(option)
    smallest_peak = min(ordered, key=lambda o: (o.backward_peak_bytes, o.kept_bytes))
    if len(front) > MAX_OPTIONS:
        step = (len(front) - 1) / (MAX_OPTIONS - 1)
        front = [front[round(i * step)] for i in range(MAX_OPTIONS)]
    if all(o.backward_peak_bytes > smallest_peak.backward_peak_bytes for o in front):
        front.append(smallest_peak)
    return front[::-1]
