"""A schedule as retention intervals: which buffer stays in memory from where to where.

The plain step's operations are positions 0..n-1. Before each of them, whatever it needs and is not
in memory is recomputed (and, where that needs dropped buffers in turn, those too): the intervals
alone determine the schedule. The idea of planning in retention intervals is MOCCASIN's (Bartan et
al. 2023, arXiv 2304.14463); here they are changed by local moves, each of which re-evaluates only
the positions that it touches and can be taken back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from packlight.step import StepGraph

Interval = tuple[int, int]
Result = tuple[tuple[int, ...], frozenset[int], int, float]
INFEASIBLE = 1 << 60
BLOCK = 64
MAX_DROP_OUTPUTS = 200
MAX_HOLDS = 8


class Retention:
    """Intervals of every buffer, and what each position then costs.

    An interval (s, e) of buffer b: b is made at position s (by the plain step or by recomputation),
    is in memory when positions s+1..e start, and is dropped at e after its last use there. Interval
    ends may also be `due`: where the forward ends (an output of it) or the step ends (position n).

    Attributes:
        held_bytes: for each position, bytes in memory when it starts.
        local_bytes: for each position, the most it adds to that while it runs.
        extra_seconds: for each position, seconds of recomputation before it.
        origin: which operation makes each buffer first.
        maker: which one makes it again (`TransferRetention` has other ways to come by a buffer).
        num_evaluations: positions worked out so far (eight recomputations there count as one more),
            the measure of effort.
    """

    def __init__(self, graph: StepGraph) -> None:
        operations, buffers = graph.computations, graph.buffers
        self.graph = graph
        self.num_positions = n = len(operations)
        resident = [b.id in graph.resident for b in buffers]
        self.size = [0 if resident[b.id] else b.bytes for b in buffers]
        self.reads = [tuple(b for b in o.touches if not resident[b]) for o in operations]
        self.creates = [o.creates for o in operations]
        self.seconds = [o.seconds for o in operations]
        self.workspace = [o.workspace_bytes for o in operations]
        self.grows = [sum(self.size[b] for b in o.creates) + o.workspace_bytes for o in operations]
        handed_out = set(graph.outputs) & set(graph.forward_outputs)
        self.can_recompute = [
            o.can_recompute and handed_out.isdisjoint(o.creates) for o in operations
        ]
        self.overwrites = [
            tuple(
                (v, c)
                for c, v in sorted(o.overwrites, key=lambda pair: -self.size[pair[0]])
                if not resident[v]
            )
            for o in operations
        ]
        self.first_chance = list(range(n))  # after its own position
        self.last_chance = graph.last_chances()
        self.maker = [-1] * len(buffers)
        for o in operations:
            for b in o.creates:
                self.maker[b] = o.id
        self.origin = list(self.maker)
        # Recomputing a parameter's gradient hardly ever pays: looked at in small steps only.
        outputs, forward_outputs = set(graph.outputs), set(graph.forward_outputs)
        small = n <= MAX_DROP_OUTPUTS
        pinned = outputs & forward_outputs if small else outputs | forward_outputs
        self.is_fixed = [
            resident[b.id]
            or b.id in pinned
            or self.maker[b.id] < 0
            or not self.can_recompute[self.maker[b.id]]
            for b in buffers
        ]
        self.due: dict[int, tuple[int, ...]] = {}
        for b in {*graph.forward_outputs, *graph.outputs}:
            in_forward = (graph.num_forward,) if b in graph.forward_outputs else ()
            self.due[b] = (*in_forward, n) if b in graph.outputs else in_forward
        self.intervals: list[list[Interval]] = [[] for _ in buffers]
        self.starts: list[set[int]] = [set() for _ in range(n + 1)]
        self.lists: list[tuple[int, ...]] = [()] * n
        self.used: list[frozenset[int]] = [frozenset()] * n
        self.used_at: list[set[int]] = [set() for _ in buffers]
        self.rerun_at: dict[int, set[int]] = {}
        self.held_bytes: npt.NDArray[np.int64] = np.zeros(n + 2, dtype=np.int64)
        self.local_bytes: npt.NDArray[np.int64] = np.zeros(n, dtype=np.int64)
        self.extra_seconds: npt.NDArray[np.float64] = np.zeros(n)
        self.num_evaluations = 0
        # What a position lacked that cannot be made again, when it was last evaluated.
        self._lacking: dict[int, list[int]] = {}
        self._blocks: list[dict[int, int]] = [{} for _ in range(n // BLOCK + 2)]
        self._journal: list[tuple[int, list[Interval] | None, Result | None]] = []

    # -- building

    @classmethod
    def from_order(cls, graph: StepGraph, order: Sequence[int]) -> Retention:
        """Return the intervals behind an order of operations.

        The first run of each operation is its position in the plain step; every further run is a
        recomputation, done before the next first run. Recomputations that nobody needs disappear.
        """
        self = cls(graph)
        self.load(order)
        return self

    def load(self, order: Sequence[int]) -> None:
        """Take over the intervals behind an order: see `from_order`."""
        graph = self.graph
        n, num_forward = self.num_positions, min(graph.num_forward, self.num_positions)
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
            for buffer in self.reads[index]:
                last[buffer] = position
            for buffer in self.creates[index]:
                if buffer in made:
                    if self.is_fixed[buffer]:
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
        self._begin(found)

    @classmethod
    def from_nothing(cls, graph: StepGraph, drop_gradients: bool) -> Retention:
        """Return intervals that keep as little as can be: everything is recomputed at every use.

        Args:
            graph: the step.
            drop_gradients: recompute what the backward made, too.
        """
        self = cls(graph)
        plain = cls.from_order(graph, range(self.num_positions))
        found = [list(intervals) for intervals in plain.intervals]
        for buffer, intervals in enumerate(found):
            maker = self.maker[buffer]
            is_gradient = maker >= graph.num_forward
            if not intervals or (is_gradient and not drop_gradients):
                continue
            start = intervals[0][0]
            if self.is_fixed[buffer]:
                found[buffer] = [(start, max(intervals[-1][1], self.num_positions - 1))]
                continue
            near = [
                (start, max((u for u in plain.used_at[buffer] if u <= start + 1), default=start))
                if is_gradient
                else (
                    start,
                    max((u for u in plain.used_at[buffer] if u < graph.num_forward), default=start),
                )
            ]
            ends = [(max(due - 1, start), due) for due in self.due.get(buffer, ())]
            found[buffer] = _merged([i for i in (*near, *ends) if i[1] > i[0]])
        self._begin(found)
        for buffer, intervals in enumerate(self.intervals):
            if self.is_fixed[buffer] and intervals:
                start, end = intervals[0][0], max(self.uses(buffer), default=0)
                self.set_intervals(buffer, [(start, end)] if end > start else [])
        self._journal.clear()
        return self

    def _begin(self, found: list[list[Interval]]) -> None:
        for buffer, intervals in enumerate(found):
            self._hold(buffer, intervals)
        for position in range(self.num_positions):
            self.evaluate(position)
        for buffer in range(len(self.size)):
            self.trim(buffer)
        self._journal.clear()

    # -- reading

    @property
    def peaks(self) -> npt.NDArray[np.int64]:
        """Peak during each position."""
        return self.held_bytes[: self.num_positions] + self.local_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest of all positions' peaks."""
        return int(self.peaks.max()) if self.num_positions else 0

    @property
    def total_extra_seconds(self) -> float:
        """Seconds of recomputation."""
        return float(self.extra_seconds.sum())

    @property
    def is_feasible(self) -> bool:
        """Whether every position can run."""
        return self.peak_bytes < INFEASIBLE

    def order(self) -> list[int]:
        """Return the order in which operations run."""
        return [i for p in range(self.num_positions) for i in (*self.lists[p], p)]

    def held_at(self, position: int) -> list[int]:
        """Return the buffers in memory when a position starts, in the order of their ids."""
        return sorted(
            b
            for b in self._blocks[position // BLOCK]
            if any(start < position <= end for start, end in self.intervals[b])
        )

    def uses(self, buffer: int) -> list[int]:
        """Return where a buffer is read from memory or due, in order."""
        due = self.due.get(buffer)
        return sorted(self.used_at[buffer] if due is None else {*self.used_at[buffer], *due})

    # -- one position

    def evaluate(self, position: int) -> bool:
        """Work out what a position recomputes, costs and holds; return whether it can run."""
        creates = self.creates[position]
        rerun: set[int] = set()
        used: set[int] = set()
        intervals, maker, can_recompute = self.intervals, self.maker, self.can_recompute
        first_chance, last_chance = self.first_chance, self.last_chance
        stack = list(self.reads[position])
        if self.starts[position]:
            stack.extend(b for b in self.starts[position] if b not in creates)
        ok = True
        lacking: list[int] = []
        checked: set[int] = set()
        while stack:
            buffer = stack.pop()
            if buffer in checked:
                continue
            checked.add(buffer)
            for start, end in intervals[buffer]:
                if start < position <= end:
                    used.add(buffer)
                    break
            else:
                index = maker[buffer]
                if (
                    first_chance[index] >= position
                    or not can_recompute[index]
                    or last_chance[index] < position
                ):
                    ok = False
                    lacking.append(buffer)
                elif index not in rerun:
                    rerun.add(index)
                    stack.extend(self.reads[index])
        sequence = self.arranged(rerun, position) if rerun else ()
        self._lacking[position] = lacking
        self.num_evaluations += 1 + len(sequence) // 8
        local, extra = INFEASIBLE, 0.0
        if ok:
            local = self._local_peak(position, sequence)
            if sequence:
                extra = sum(self.seconds[i] for i in sequence)
        old = (
            self.lists[position],
            self.used[position],
            int(self.local_bytes[position]),
            float(self.extra_seconds[position]),
        )
        self._journal.append((position, None, old))
        self._store(position, (sequence, frozenset(used), local, extra))
        return ok

    def arranged(self, rerun: set[int], position: int) -> tuple[int, ...]:
        """Return in which order a position runs what it runs again."""
        return tuple(sorted(rerun))

    def _store(self, position: int, result: Result) -> None:
        sequence, used, local, extra = result
        if sequence != self.lists[position]:
            for index in self.lists[position]:
                self.rerun_at[index].discard(position)
            for index in sequence:
                self.rerun_at.setdefault(index, set()).add(position)
            self.lists[position] = sequence
        if used != self.used[position]:
            for buffer in self.used[position] - used:
                self.used_at[buffer].discard(position)
            for buffer in used - self.used[position]:
                self.used_at[buffer].add(position)
            self.used[position] = used
        self.local_bytes[position] = local
        self.extra_seconds[position] = extra

    def _local_peak(self, position: int, sequence: tuple[int, ...]) -> int:
        size, reads, creates, intervals = self.size, self.reads, self.creates, self.intervals
        steps = (*sequence, position)
        last_read: dict[int, int] = {}
        for step, index in enumerate(steps):
            for buffer in reads[index]:
                last_read[buffer] = step

        def stays(buffer: int) -> bool:
            return any(start <= position < end for start, end in intervals[buffer])

        live = peak = 0
        for step, index in enumerate(steps):
            mine = creates[index]
            during = live + self.grows[index]
            for victim, created in self.overwrites[index]:
                if last_read[victim] == step and not stays(victim):
                    during -= size[created]
                    break
            if during > peak:
                peak = during
            for buffer in mine:
                if last_read.get(buffer, -1) > step or stays(buffer):
                    live += size[buffer]
            for buffer in set(reads[index]):
                if last_read[buffer] == step and not stays(buffer):
                    live -= size[buffer]
        return peak

    # -- changing

    def _hold(self, buffer: int, new: list[Interval]) -> None:
        size, held, blocks = self.size[buffer], self.held_bytes, self._blocks
        for start, end in self.intervals[buffer]:
            self.starts[start].discard(buffer)
            held[start + 1 : end + 1] -= size
            for block in range((start + 1) // BLOCK, end // BLOCK + 1):
                blocks[block][buffer] -= 1
                if not blocks[block][buffer]:
                    del blocks[block][buffer]
        for start, end in new:
            self.starts[start].add(buffer)
            held[start + 1 : end + 1] += size
            for block in range((start + 1) // BLOCK, end // BLOCK + 1):
                blocks[block][buffer] = blocks[block].get(buffer, 0) + 1
        self.intervals[buffer] = new

    def set_intervals(self, buffer: int, new: list[Interval]) -> bool:
        """Replace a buffer's intervals; return whether all positions can still run."""
        old = self.intervals[buffer]
        touched = {place for interval in (*old, *new) for place in interval}
        self._journal.append((buffer, old, None))
        self._hold(buffer, new)
        touched |= self.used_at[buffer]
        touched |= self.rerun_at.get(self.maker[buffer], set())
        touched.discard(self.num_positions)
        ok = True
        for position in sorted(touched):
            ok = self.evaluate(position) and ok
        return ok

    def _turn(self, buffer: int) -> None:
        """Take back another way to come by a buffer. Here, there is only one."""
        raise AssertionError("nothing but recomputation brings a buffer back here")

    def replace_intervals(self, buffer: int, new: list[Interval]) -> bool:
        """Do the same; where something then lacks what cannot run again any more, hold that, too.

        A gradient may be made again at the end of the step if what it is made from is kept: the
        parameters in between have been updated by then.
        """
        if self.set_intervals(buffer, new):
            return True
        for _ in range(MAX_HOLDS):
            broken = [p for p in np.flatnonzero(self.local_bytes >= INFEASIBLE).tolist()]
            if not broken:
                return True
            position = broken[0]
            self.evaluate(position)
            for lacking in self._lacking[position]:
                filled = self.with_gap_filled(lacking, position)
                if filled is None:
                    return False
                self.set_intervals(lacking, filled[0])
        return self.is_feasible

    def mark(self) -> int:
        """Return a point to go back to with `undo_to`."""
        return len(self._journal)

    def undo_to(self, mark: int) -> None:
        """Take back all changes since a mark. Costs no evaluations."""
        while len(self._journal) > mark:
            place, intervals, result = self._journal.pop()
            if intervals is not None:
                self._hold(place, intervals)
            elif result is not None:
                self._store(place, result)
            else:
                self._turn(place)

    def trim(self, buffer: int) -> None:
        """Shorten a buffer's intervals to their uses; forget those without any."""
        todo = [buffer]
        while todo:
            buffer = todo.pop()
            if self.is_fixed[buffer] or not self.intervals[buffer]:
                continue
            uses = self.uses(buffer)
            new: list[Interval] = []
            for start, end in self.intervals[buffer]:
                at = bisect_left(uses, end + 1) - 1
                if at >= 0 and uses[at] > start:
                    new.append((start, uses[at]))
            if new != self.intervals[buffer]:
                gone = {s for s, _ in self.intervals[buffer]} - {s for s, _ in new}
                before: set[int] = set().union(*(self.used[p] for p in gone))
                self.set_intervals(buffer, new)
                todo.extend(sorted(before - {buffer}))

    def without_gap(self, buffer: int, position: int) -> list[Interval] | None:
        """Return the intervals with a hole around a position, or None where there is no gap.

        The hole reaches from the last use before the position to the next use at or after it; a
        buffer that is next due as an output is made again just before.
        """
        if self.is_fixed[buffer]:
            return None
        for index, (start, end) in enumerate(self.intervals[buffer]):
            if start < position <= end:
                uses = self.uses(buffer)
                at = bisect_left(uses, position)
                before = max(start, uses[at - 1] if at > 0 else start)
                after = uses[at] if at < len(uses) and uses[at] <= end else end
                if after in self.due.get(buffer, ()):
                    after -= 1
                    if position > after:
                        return None
                new = self.intervals[buffer][:index]
                if before > start:
                    new.append((start, before))
                if after < end:
                    new.append((after, end))
                return new + self.intervals[buffer][index + 1 :]
        return None

    def with_gap_filled(self, buffer: int, position: int) -> tuple[list[Interval], int] | None:
        """Return intervals that hold a buffer from where it last was in memory until a position.

        Returns:
            (intervals, position where it last was), or None if it never was.
        """
        intervals, origin = self.intervals[buffer], self.origin[buffer]
        latest = origin if origin < position else -1
        for start, end in intervals:
            if end < position:
                latest = max(latest, end)
            elif start < position:
                return None
        for other in self.rerun_at.get(self.maker[buffer], ()):
            if other < position:
                latest = max(latest, other)
        if latest < 0:
            return None
        return _merged([*intervals, (latest, position)]), latest


def _merged(intervals: list[Interval]) -> list[Interval]:
    """Return intervals in order, those that touch or overlap as one."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result
