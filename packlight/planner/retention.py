"""A schedule as retention intervals: which buffer stays in memory from where to where.

The plain step's operations are positions 0..n-1. Before each of them, whatever it needs and is not in
memory is recomputed (and, where that needs dropped buffers in turn, those too): the intervals alone
determine the schedule. The idea of planning in retention intervals is MOCCASIN's (Bartan et al. 2023,
arXiv 2304.14463); here they are changed by local moves, each of which re-evaluates only the positions
that it touches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from packlight.step import StepGraph

Interval = tuple[int, int]
INFEASIBLE = 1 << 60


class Retention:
    """Intervals of every buffer, and what each position then costs.

    An interval (s, e) of buffer b: b is made at position s (by the plain step or by recomputation),
    is in memory when positions s+1..e start, and is dropped at e after its last use there.

    Attributes:
        held_bytes: for each position, bytes in memory when it starts.
        local_bytes: for each position, the most it adds to that while it runs.
        extra_seconds: for each position, seconds of recomputation before it.
    """

    def __init__(self, graph: StepGraph) -> None:
        operations, buffers = graph.operations, graph.buffers
        self.graph = graph
        self.num_positions = len(operations)
        resident = [b.kind.is_resident for b in buffers]
        self.size = [0 if resident[b.id] else b.bytes for b in buffers]
        self.reads = [tuple(b for b in o.reads if not resident[b]) for o in operations]
        self.creates = [o.creates for o in operations]
        self.seconds = [o.seconds for o in operations]
        self.workspace = [o.workspace_bytes for o in operations]
        self.overwrites = [dict((v, c) for c, v in o.overwrites) for o in operations]
        self.maker = [-1] * len(buffers)
        for o in operations:
            for b in o.creates:
                self.maker[b] = o.id
        fixed = set(graph.outputs) | set(graph.forward_outputs)
        self.is_fixed = [
            resident[b.id] or b.id in fixed or self.maker[b.id] < 0
            or not operations[self.maker[b.id]].can_recompute
            for b in buffers
        ]
        self.intervals: list[list[Interval]] = [[] for _ in buffers]
        self.starts: list[set[int]] = [set() for _ in range(self.num_positions + 1)]
        self.lists: list[tuple[int, ...]] = [()] * self.num_positions
        self.used: list[frozenset[int]] = [frozenset()] * self.num_positions
        self.used_at: list[set[int]] = [set() for _ in buffers]
        self.rerun_at: list[set[int]] = [set() for _ in operations]
        self.held_bytes = np.zeros(self.num_positions + 2, dtype=np.int64)
        self.local_bytes = np.zeros(self.num_positions, dtype=np.int64)
        self.extra_seconds = np.zeros(self.num_positions)
        self.num_evaluations = 0

    # -- building

    @classmethod
    def from_order(cls, graph: StepGraph, order: Sequence[int]) -> Retention:
        """Return the intervals behind an order of operations.

        The first run of each operation is its position in the plain step; every further run is a
        recomputation, done before the next first run. Recomputations that nobody needs disappear.
        """
        self = cls(graph)
        n = self.num_positions
        made: dict[int, int] = {}
        last: dict[int, int] = {}
        seen = [False] * n
        position = 0
        pending: list[int] = []

        def close(buffer: int) -> None:
            start, end = made.pop(buffer), last.pop(buffer, -1)
            if end > start:
                self.intervals[buffer].append((start, end))

        for index in order:
            if seen[index] and not graph.operations[index].can_recompute:
                continue  # its buffer is still there: whoever reads it again keeps it
            for buffer in self.reads[index]:
                last[buffer] = position
            if seen[index]:
                pending.append(index)
            for buffer in self.creates[index]:
                if buffer in made:
                    close(buffer)
                made[buffer] = position
            if not seen[index]:
                seen[index] = True
                position += 1
                pending.clear()
        for buffer in graph.forward_outputs:
            last[buffer] = max(last.get(buffer, 0), min(graph.num_forward, n))
        for buffer in graph.outputs:
            last[buffer] = n
        for buffer in list(made):
            close(buffer)
        self._rebuild()
        return self

    def _rebuild(self) -> None:
        for buffer, intervals in enumerate(self.intervals):
            for start, end in intervals:
                self.starts[start].add(buffer)
                self.held_bytes[start + 1 : end + 1] += self.size[buffer]
        for position in range(self.num_positions):
            self.evaluate(position)
        for buffer in range(len(self.size)):
            self.trim(buffer)

    # -- reading

    @property
    def peaks(self) -> np.ndarray:
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

    def is_held(self, buffer: int, position: int) -> bool:
        """Whether a buffer is in memory when a position starts."""
        return any(start < position <= end for start, end in self.intervals[buffer])

    def order(self) -> list[int]:
        """Return the order in which operations run."""
        return [i for p in range(self.num_positions) for i in (*self.lists[p], p)]

    # -- one position

    def evaluate(self, position: int) -> bool:
        """Work out what a position recomputes, costs and holds; return whether it can run."""
        self.num_evaluations += 1
        for index in self.lists[position]:
            self.rerun_at[index].discard(position)
        for buffer in self.used[position]:
            self.used_at[buffer].discard(position)
        creates = self.creates[position]
        rerun: set[int] = set()
        used: set[int] = set()
        stack = [b for b in self.reads[position]]
        stack.extend(b for b in self.starts[position] if b not in creates)
        ok = True
        intervals, maker, graph = self.intervals, self.maker, self.graph
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
                if index >= position or not graph.operations[index].can_recompute:
                    ok = False
                    continue
                if index not in rerun:
                    rerun.add(index)
                    stack.extend(self.reads[index])
        sequence = tuple(sorted(rerun))
        self.lists[position] = sequence
        self.used[position] = frozenset(used)
        for index in sequence:
            self.rerun_at[index].add(position)
        for buffer in used:
            self.used_at[buffer].add(position)
        if ok:
            self.local_bytes[position] = self._local_peak(position, sequence)
            self.extra_seconds[position] = sum(self.seconds[i] for i in sequence)
        else:
            self.local_bytes[position] = INFEASIBLE
            self.extra_seconds[position] = 0.0
        return ok

    def _local_peak(self, position: int, sequence: tuple[int, ...]) -> int:
        size, reads, creates = self.size, self.reads, self.creates
        steps = (*sequence, position)
        last_read: dict[int, int] = {}
        for step, index in enumerate(steps):
            for buffer in reads[index]:
                last_read[buffer] = step
        live = peak = 0
        present: set[int] = set()
        for step, index in enumerate(steps):
            mine = creates[index]
            growth = 0
            for buffer in mine:
                growth += size[buffer]
            during = growth + self.workspace[index]
            for buffer in reads[index]:
                if last_read[buffer] == step:
                    victim_of = self.overwrites[index].get(buffer)
                    if victim_of is not None and not self._stays(buffer, position):
                        if self._is_wanted(victim_of, position, step, last_read):
                            during -= size[victim_of]
                            break
            peak = max(peak, live + during)
            live += growth
            present.update(mine)
            for buffer in mine:
                if last_read.get(buffer, -1) <= step and not self._stays(buffer, position):
                    live -= size[buffer]
                    present.discard(buffer)
            for buffer in reads[index]:
                if last_read[buffer] == step and not self._stays(buffer, position):
                    if buffer not in mine:
                        live -= size[buffer]
                        present.discard(buffer)
        return peak

    def _stays(self, buffer: int, position: int) -> bool:
        """Whether a buffer is in memory when the next position starts."""
        return any(start <= position < end for start, end in self.intervals[buffer])

    def _is_wanted(
        self, buffer: int, position: int, step: int, last_read: dict[int, int]
    ) -> bool:
        return last_read.get(buffer, -1) > step or self._stays(buffer, position)

    # -- changing

    def set_intervals(self, buffer: int, new: list[Interval]) -> bool:
        """Replace a buffer's intervals; return whether all positions can still run."""
        old = self.intervals[buffer]
        touched: set[int] = set()
        size = self.size[buffer]
        for start, end in old:
            self.starts[start].discard(buffer)
            self.held_bytes[start + 1 : end + 1] -= size
            touched.add(start)
            touched.add(end)
        for start, end in new:
            self.held_bytes[start + 1 : end + 1] += size
            touched.add(start)
            touched.add(end)
        for start, _ in new:
            self.starts[start].add(buffer)
        self.intervals[buffer] = new
        touched |= self.used_at[buffer]
        if self.maker[buffer] >= 0:
            touched |= self.rerun_at[self.maker[buffer]]
        touched.discard(self.num_positions)
        ok = True
        for position in sorted(touched):
            ok = self.evaluate(position) and ok
        return ok

    def trim(self, buffer: int) -> None:
        """Shorten a buffer's intervals to their uses; forget those without any."""
        if self.is_fixed[buffer]:
            return
        new: list[Interval] = []
        uses = sorted(self.used_at[buffer])
        for start, end in self.intervals[buffer]:
            at = bisect_left(uses, end + 1) - 1
            if at >= 0 and uses[at] > start:
                new.append((start, uses[at]))
        if new != self.intervals[buffer]:
            before = self.used_snapshot(new, buffer)
            self.set_intervals(buffer, new)
            for other in before:
                if other != buffer:
                    self.trim(other)

    def used_snapshot(self, new: list[Interval], buffer: int) -> set[int]:
        """Return buffers whose uses may vanish when a buffer's intervals become `new`."""
        gone = {s for s, _ in self.intervals[buffer]} - {s for s, _ in new}
        found: set[int] = set()
        for position in gone:
            if position < self.num_positions:
                found |= self.used[position]
        return found

    def without_gap(self, buffer: int, position: int) -> list[Interval] | None:
        """Return the buffer's intervals with a hole around a position, or None where there is no gap.

        The hole reaches from the last use before the position to the next use at or after it.
        """
        if self.is_fixed[buffer]:
            return None
        for index, (start, end) in enumerate(self.intervals[buffer]):
            if start < position <= end:
                uses = sorted(self.used_at[buffer])
                at = bisect_left(uses, position)
                before = max(start, uses[at - 1] if at > 0 else start)
                after = uses[at] if at < len(uses) and uses[at] <= end else end
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
        intervals = self.intervals[buffer]
        maker = self.maker[buffer]
        latest = maker if maker < position else -1
        for start, end in intervals:
            if end < position:
                latest = max(latest, end)
            elif start < position:
                return None
        for other in self.rerun_at[maker]:
            if other < position:
                latest = max(latest, other)
        if latest < 0 or latest >= position:
            return None
        start, end = latest, position
        new: list[Interval] = []
        for interval in intervals:
            if interval[1] == start:
                start = interval[0]
            elif interval[0] == end:
                end = interval[1]
            else:
                new.append(interval)
        new.append((start, end))
        new.sort()
        return new, latest

    def copy_state(self) -> list[list[Interval]]:
        """Return the intervals, to go back to with `restore`."""
        return [list(i) for i in self.intervals]

    def restore(self, state: Iterable[list[Interval]]) -> None:
        """Go back to intervals from `copy_state`."""
        for buffer, intervals in enumerate(state):
            if intervals != self.intervals[buffer]:
                self.set_intervals(buffer, list(intervals))
