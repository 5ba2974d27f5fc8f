"""The ways to run a segment: what it keeps for its backward, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from packlight.planner.facts import Facts, Option, Segment

MAX_ENUMERATED = 8
MAX_TRIED = 24
MAX_OPTIONS = 10
SMALL_FRACTION = 0.01


def add_options(facts: Facts, segments: list[Segment]) -> None:
    """Set `options`, `pile_bytes` and `plain_peak_bytes` of all segments."""
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
        self, facts: Facts, segment: Segment, output: frozenset[int], pile: int
    ) -> None:
        self.facts, self.segment, self.output, self.pile = facts, segment, output, pile
        operations = facts.graph.computations
        self.made = [b for i in segment.forward for b in operations[i].creates]
        self.mine = mine = set(self.made)
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
        operations, local, size = self.facts.graph.computations, self.local, self.facts.size
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
            or not self.facts.graph.computations[self.facts.maker[b]].can_recompute
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
        operations, maker, size = self.facts.graph.computations, self.facts.maker, self.facts.size
        kept = fixed | frozenset(free)
        found = [self.run(kept)]
        again = self._recomputed(self.needed, kept, set())
        # The most promising are looked at first.
        remaining = sorted(free, key=lambda b: (operations[maker[b]].seconds / max(1, size[b]), b))
        while remaining:
            best: tuple[float, int, set[int]] | None = None
            for buffer in remaining[:MAX_TRIED]:
                more = self._recomputed([buffer], kept - {buffer}, again)
                rate = sum([operations[i].seconds for i in sorted(more)]) / max(1, size[buffer])
                if best is None or (rate, buffer) < best[:2]:
                    best = (rate, buffer, more)
            assert best is not None
            kept = kept - {best[1]}
            again |= best[2]
            remaining.remove(best[1])
            found.append(self.run(kept))
        return found

    def _recomputed(
        self, buffers: Iterable[int], kept: frozenset[int], again: set[int]
    ) -> set[int]:
        """Return what runs again for some buffers, besides what does already."""
        operations, maker, reads = self.facts.graph.computations, self.facts.maker, self.facts.reads
        more: set[int] = set()
        stack = list(buffers)
        while stack:
            buffer = stack.pop()
            index = maker[buffer]
            if buffer not in self.mine or buffer in kept or buffer in self.output:
                continue
            if index not in again and index not in more and operations[index].can_recompute:
                more.add(index)
                stack.extend(reads[index])
        return more

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
        """Return the most that the forward adds to its input frontier when it keeps `kept`."""
        facts, segment = self.facts, self.segment
        operations, size = facts.graph.computations, facts.size
        last: dict[int, int] = {}
        for i in segment.forward:
            for b in facts.reads[i]:
                last[b] = i
        stay = kept | self.output
        live = peak = 0
        mine = self.mine
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
        operations, size, maker = facts.graph.computations, facts.size, facts.maker
        mine = self.mine
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
        readers = facts.last_reader
        for i in segment.backward:
            for b in (*facts.graph.computations[i].creates, *facts.reads[i]):
                if facts.maker[b] >= facts.graph.num_forward:
                    if b in outputs or readers.get(b, -1) > last_backward:
                        self._outliving.add(b)
        touched = {
            b for i in segment.backward
            for b in (*facts.graph.computations[i].creates, *facts.reads[i])
            if facts.maker[b] >= facts.graph.num_forward
        }
        created = {b for i in segment.backward for b in facts.graph.computations[i].creates}
        pile = self.pile
        for b in touched:
            if b in created and b in self._outliving:
                pile += facts.size[b]
            elif b not in created and b not in self._outliving:
                pile -= facts.size[b]
        return pile


def _pareto(options: list[Option]) -> list[Option]:
    """Return options that no other beats in both bytes kept and seconds, at most MAX_OPTIONS."""
    ordered = sorted(
        options,
        key=lambda o: (o.kept_bytes, o.extra_seconds, o.backward_peak_bytes, sorted(o.kept)),
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
