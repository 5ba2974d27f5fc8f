"""A schedule as retention intervals: which buffer stays in memory from where to where.

The intervals alone determine the schedule: see `Positions`. The idea of planning in retention
intervals is MOCCASIN's (Bartan et al. 2023, arXiv 2304.14463); here they are changed by local
moves, each of which re-evaluates only the positions that it touches and can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packlight.planner.facts import Facts, mask_of
from packlight.planner.intervals import (
    Interval,
    behind_order,
    merged,
    of_nothing,
    shortened,
    without_gap,
)
from packlight.planner.positions import INFEASIBLE, Positions
from packlight.step import StepGraph

MAX_DROP_OUTPUTS = 200
MAX_HOLDS = 8


class Retention(Positions):
    """Intervals of every buffer, and what each position then costs.

    An interval (s, e) of buffer b: b is made at position s (by the plain step or by recomputation),
    is in memory when positions s+1..e start, and is dropped at e after its last use there. Interval
    ends may also be `due`: where the forward ends (an output of it) or the step ends (position n).

    Attributes:
        intervals: of each buffer.
        is_fixed: which buffers stay in memory once made.
        due: where outputs must be in memory.
    """

    def __init__(self, graph: StepGraph, facts: Facts | None = None) -> None:
        """Prepare intervals.

        Args:
            graph: the step.
            facts: about it, where they are at hand.
        """
        facts = facts or Facts(graph)
        super().__init__(graph, facts)
        self.due, self._is_due = facts.due, facts.is_due
        # Recomputing a parameter's gradient hardly ever pays: looked at in small steps only.
        outputs, forward_outputs = set(graph.outputs), set(graph.forward_outputs)
        small = self.num_positions <= MAX_DROP_OUTPUTS
        pinned = outputs & forward_outputs if small else outputs | forward_outputs
        self.is_fixed = [
            maker < 0 or b in pinned or not self.can_recompute[maker]
            for b, maker in enumerate(self.maker)
        ]
        self.intervals: list[list[Interval]] = [[] for _ in graph.buffers]
        sizes = np.array(self.size, dtype=np.float64)
        again = np.array(self.seconds + [0.0])[self.maker]  # nothing makes what was there before
        self._rates = -sizes / (again + 1e-9)
        can_drop = (b for b, fixed in enumerate(self.is_fixed) if not fixed and self.size[b])
        self._droppable = mask_of(can_drop, self._bit)

    # -- building

    @classmethod
    def from_order(
        cls, graph: StepGraph, order: Sequence[int], facts: Facts | None = None
    ) -> Retention:
        """Return the intervals behind an order of operations.

        The first run of each operation is its position in the plain step; every further run is a
        recomputation, done before the next first run. Recomputations that nobody needs disappear.
        """
        self = cls(graph, facts)
        self.load(order)
        return self

    def load(self, order: Sequence[int]) -> None:
        """Take over the intervals behind an order: see `from_order`."""
        self._begin(behind_order(self, order))

    @classmethod
    def from_nothing(
        cls, graph: StepGraph, drop_gradients: bool, facts: Facts | None = None
    ) -> Retention:
        """Return intervals that keep as little as can be: everything is recomputed at every use.

        Args:
            graph: the step.
            drop_gradients: recompute what the backward made, too.
            facts: about it, where they are at hand.
        """
        self = cls(graph, facts)
        plain = cls.from_order(graph, range(self.num_positions), facts)
        self._begin(of_nothing(self, plain, drop_gradients))
        for buffer, intervals in enumerate(self.intervals):
            if self.is_fixed[buffer] and intervals:
                start, end = intervals[0][0], max(self.uses(buffer), default=0)
                self.set_intervals(buffer, [(start, end)] if end > start else [])
        self._journal.clear()
        return self

    def _begin(self, found: list[list[Interval]]) -> None:
        for masks, all_of_it in ((self._reads, self.reads), (self._creates, self.creates)):
            masks.extend(mask_of(buffers, self._bit) for buffers in all_of_it[len(masks) :])
        self.intervals = found
        self.held.fill(found, self.size, self._bit)
        for position in range(self.num_positions):
            self._store(position, self._worked_out(position))
        for buffer in range(len(self.size)):
            self.trim(buffer)
        self._journal.clear()

    # -- reading

    def droppable_at(self, position: int) -> list[int]:
        """Return what a position finds in memory, does not use, and could do without.

        Outputs come last; of the others those first that promise most bytes per second.
        """
        idle = self.held.at(position) & ~self._used[position] & self._droppable
        buffers = self._facts.buffer_array_of(idle)
        order = np.lexsort((buffers, self._rates[buffers], self._is_due[buffers]))
        ordered: list[int] = buffers[order].tolist()
        return ordered

    def can_drop(self, buffer: int) -> bool:
        """Whether anything is won by dropping a buffer, and it can be made again."""
        return self._droppable & self._bit[buffer] != 0

    def comes_from(self, buffer: int, maker: int, is_fixed: bool) -> None:
        """Note how a buffer is made again, and whether it has to stay all the same."""
        bit, size = self._bit[buffer], self.size[buffer]
        self.maker[buffer], self.is_fixed[buffer] = maker, is_fixed
        is_turned = maker != self.origin[buffer]
        self._turned = self._turned | bit if is_turned else self._turned & ~bit
        self._droppable = self._droppable & ~bit if is_fixed or not size else self._droppable | bit
        self._rates[buffer] = -size / (self.seconds[maker] + 1e-9)

    def uses(self, buffer: int) -> list[int]:
        """Return where a buffer is read from memory or due, in order."""
        due = self.due.get(buffer)
        return sorted(self.used_at[buffer] if due is None else {*self.used_at[buffer], *due})

    # -- changing

    def _hold(self, buffer: int, new: list[Interval]) -> None:
        self.held.change(self._bit[buffer], self.size[buffer], self.intervals[buffer], new)
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
            new = shortened(self.intervals[buffer], self.uses(buffer))
            if new != self.intervals[buffer]:
                gone = {s for s, _ in self.intervals[buffer]} - {s for s, _ in new}
                before = 0
                for place in gone:
                    before |= self._used[place]
                self.set_intervals(buffer, new)
                todo.extend(self._facts.buffers_of(before & ~self._bit[buffer]))

    def without_gap(self, buffer: int, position: int) -> list[Interval] | None:
        """Return the intervals with a hole around a position: see `intervals.without_gap`."""
        if self.is_fixed[buffer]:
            return None
        due = self.due.get(buffer, ())
        return without_gap(self.intervals[buffer], self.uses(buffer), due, position)

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
        return merged([*intervals, (latest, position)]), latest
