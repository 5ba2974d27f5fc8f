"""A schedule as retention intervals: which buffer stays in memory from where to where.

The plain step's operations are positions 0..n-1. Before each of them, whatever it needs and is not
in memory is recomputed (and, where that needs dropped buffers in turn, those too): the intervals
alone determine the schedule. The idea of planning in retention intervals is MOCCASIN's (Bartan et
al. 2023, arXiv 2304.14463); here they are changed by local moves, each of which re-evaluates only
the positions that it touches and can be taken back.

Sets of buffers are bit masks, the bits in the order in which buffers are first made: the highest
bit of what is missing has the latest maker, so what is to be recomputed is found in reverse order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from packlight.planner.facts import Facts, mask_of
from packlight.planner.intervals import Interval, behind_order, merged, of_nothing
from packlight.step import StepGraph

# What a position runs again, what it finds in memory, what it reads in all; its peak and seconds.
Result = tuple[tuple[int, ...], int, int, int, float]
INFEASIBLE = 1 << 60
MIN_BLOCK = 8
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
        lists: for each position, what it runs again, in order.
        origin: which operation makes each buffer first.
        maker: which one makes it again (`TransferRetention` has other ways to come by a buffer).
        num_evaluations, num_looks: positions worked out so far (16 recomputations there count as
            one more), the measure of effort; looks at whether something could be held, which are
            cheaper, are counted besides.
    """

    def __init__(self, graph: StepGraph, facts: Facts | None = None) -> None:
        """Prepare intervals.

        Args:
            graph: the step.
            facts: about it, where they are at hand.
        """
        facts = facts or Facts(graph)
        self.graph = graph
        operations = graph.computations
        self.num_positions = n = len(operations)
        # Lists of their own: `TransferRetention` adds to them.
        self.size, self.due = facts.size, facts.due
        self.reads, self.overwrites = list(facts.reads), list(facts.overwrites)
        self.creates = [o.creates for o in operations]
        self.seconds = [o.seconds for o in operations]
        self.workspace = [o.workspace_bytes for o in operations]
        self.grows, self.can_recompute = list(facts.grows), list(facts.can_recompute)
        self.first_chance = list(range(n))  # after its own position
        self.last_chance, self.origin = list(facts.last_chance), facts.maker
        self.maker = list(facts.maker)
        # Recomputing a parameter's gradient hardly ever pays: looked at in small steps only.
        outputs, forward_outputs = set(graph.outputs), set(graph.forward_outputs)
        small = n <= MAX_DROP_OUTPUTS
        pinned = outputs & forward_outputs if small else outputs | forward_outputs
        self.is_fixed = [
            maker < 0 or b in pinned or not self.can_recompute[maker]
            for b, maker in enumerate(self.maker)
        ]
        self.intervals: list[list[Interval]] = [[] for _ in graph.buffers]
        self.lists: list[tuple[int, ...]] = [()] * n
        self.used_at: list[set[int]] = [set() for _ in graph.buffers]
        self.rerun_at: dict[int, set[int]] = {}
        self.held_bytes: npt.NDArray[np.int64] = np.zeros(n + 2, dtype=np.int64)
        self.local_bytes: npt.NDArray[np.int64] = np.zeros(n, dtype=np.int64)
        self.extra_seconds: npt.NDArray[np.float64] = np.zeros(n)
        self.num_evaluations = self.num_looks = 0
        # -- as masks
        self._by_rank, self._bit = facts.by_rank, facts.bit
        self._by_rank_array = np.array(facts.by_rank, dtype=np.int64)
        self._is_due = facts.is_due
        sizes = np.array(self.size, dtype=np.float64)
        again = np.array(self.seconds + [0.0])[self.maker]  # nothing makes what was there before
        self._rates = -sizes / (again + 1e-9)
        can_drop = (b for b, fixed in enumerate(self.is_fixed) if not fixed and self.size[b])
        self._droppable = mask_of(can_drop, self._bit)
        self._reads, self._creates = list(facts.reads_masks), list(facts.creates_masks)
        # What starts and ends at each position; what it finds in memory; what is read there.
        self._starts, self._ends = [0] * (n + 1), [0] * (n + 1)
        self._used, self._touched = [0] * n, [0] * n
        # What is held at a position: what is throughout its block, but for what is noted besides.
        self._block = max(MIN_BLOCK, math.isqrt(n))
        self._throughout, self._besides = [0] * (n // self._block + 2), [0] * (n + 2)
        # What a position lacked that cannot be made again, when it was last evaluated.
        self._lacking: dict[int, list[int]] = {}
        self._journal: list[tuple[int, list[Interval] | None, Result | None]] = []

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
        starts, ends, held_bytes = self._starts, self._ends, self.held_bytes
        for buffer, intervals in enumerate(found):
            bit, size = self._bit[buffer], self.size[buffer]
            for start, end in intervals:
                starts[start] |= bit
                ends[end] |= bit
                held_bytes[start + 1 : end + 1] += size
        self.intervals, held = found, 0
        for position in range(self.num_positions + 1):
            self._besides[position] = held
            held = (held & ~ends[position]) | starts[position]
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

    def droppable_at(self, position: int) -> list[int]:
        """Return what a position finds in memory, does not use, and could do without.

        Outputs come last; of the others those first that promise most bytes per second.
        """
        buffers = self._buffers(self._held(position) & ~self._used[position] & self._droppable)
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
        self._droppable = self._droppable & ~bit if is_fixed or not size else self._droppable | bit
        self._rates[buffer] = -size / (self.seconds[maker] + 1e-9)

    def used_by(self, position: int) -> list[int]:
        """Return the buffers that a position finds in memory and uses, by id."""
        used: list[int] = self._buffers(self._used[position]).tolist()
        return used

    def is_read_at(self, buffer: int, position: int) -> bool:
        """Whether a position or what it runs again reads a buffer, or it stays from there on."""
        return self._touched[position] & self._bit[buffer] != 0

    def uses(self, buffer: int) -> list[int]:
        """Return where a buffer is read from memory or due, in order."""
        due = self.due.get(buffer)
        return sorted(self.used_at[buffer] if due is None else {*self.used_at[buffer], *due})

    # -- masks

    def _held(self, position: int) -> int:
        """Return what is in memory when a position starts."""
        return self._throughout[position // self._block] ^ self._besides[position]

    def _buffers(self, mask: int) -> npt.NDArray[np.int64]:
        """Return the buffers of a mask by id."""
        packed = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), dtype=np.uint8)
        ranks = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
        return np.sort(self._by_rank_array[ranks])

    # -- one position

    def evaluate(self, position: int) -> bool:
        """Work out what a position recomputes, costs and holds; return whether it can run."""
        maker, by_rank, reads, creates = self.maker, self._by_rank, self._reads, self._creates
        can_recompute = self.can_recompute
        first_chance, last_chance = self.first_chance, self.last_chance
        held, starts = self._held(position), self._starts[position]
        touched = reads[position] | (starts & ~creates[position]) if starts else reads[position]
        missing = touched & ~held
        rerun: list[int] = []
        lacking: list[int] = []
        known = held  # what need not be looked for (again)
        while missing:
            rank = missing.bit_length() - 1
            index = maker[by_rank[rank]]
            if (
                first_chance[index] >= position
                or not can_recompute[index]
                or last_chance[index] < position
            ):
                lacking.append(by_rank[rank])
                known |= 1 << rank
                missing ^= 1 << rank
            else:
                rerun.append(index)
                known |= creates[index]
                touched |= reads[index]
                missing = (missing | reads[index]) & ~known
        sequence = self.arranged(rerun, position) if rerun else ()
        self._lacking[position] = lacking
        self.num_evaluations += 1 + len(sequence) // 16
        local, extra = INFEASIBLE, 0.0
        if not lacking:
            local = self._local_peak(position, sequence, held)
            if sequence:
                seconds = self.seconds
                extra = sum([seconds[i] for i in sequence])
        self._journal.append((position, None, self._result(position)))
        used = touched & held
        touched |= starts
        self._store(position, (sequence, used, touched, local, extra))
        return not lacking

    def arranged(self, rerun: list[int], position: int) -> tuple[int, ...]:
        """Return in which order a position runs what it runs again.

        Args:
            rerun: that, the latest makers first.
            position: where.
        """
        return tuple(rerun[::-1])

    def _result(self, position: int) -> Result:
        return (
            self.lists[position],
            self._used[position],
            self._touched[position],
            int(self.local_bytes[position]),
            float(self.extra_seconds[position]),
        )

    def _store(self, position: int, result: Result) -> None:
        sequence, used, touched, local, extra = result
        before = self.lists[position]
        if sequence != before:
            for index in set(before).difference(sequence):
                self.rerun_at[index].discard(position)
            for index in set(sequence).difference(before):
                self.rerun_at.setdefault(index, set()).add(position)
            self.lists[position] = sequence
        changed = used ^ self._used[position]
        while changed:
            rank = changed.bit_length() - 1
            changed ^= 1 << rank
            places = self.used_at[self._by_rank[rank]]
            if used >> rank & 1:
                places.add(position)
            else:
                places.discard(position)
        self._used[position], self._touched[position] = used, touched
        self.local_bytes[position] = local
        self.extra_seconds[position] = extra

    def _local_peak(self, position: int, sequence: tuple[int, ...], held: int) -> int:
        """Return the most that a position adds to what is held when it starts.

        Backwards: the most from a step on is what it needs itself, or what it leaves behind and the
        most from the next one on.
        """
        size, bit, reads, creates = self.size, self._bit, self._reads, self._creates
        if not sequence and not self.overwrites[position]:
            return max(0, self.grows[position])
        # What leaves memory after its last read here: held no longer, or made for this place only.
        mortal = (self._ends[position] | ~held) & ~self._starts[position]
        wanted = peak = 0
        for index in (position, *sequence[::-1]):
            during, change = self.grows[index], 0
            left = creates[index] & (wanted | ~mortal)
            if left:
                for buffer in self.creates[index]:
                    if bit[buffer] & left:
                        change += size[buffer]
            dying = reads[index] & mortal & ~wanted
            if dying:
                wanted |= dying
                for victim, created in self.overwrites[index]:
                    if bit[victim] & dying:
                        during -= size[created]
                        break
                while dying:
                    rank = dying.bit_length() - 1
                    dying ^= 1 << rank
                    change -= size[self._by_rank[rank]]
            peak = max(during, peak + change)
        return peak

    # -- changing

    def _hold(self, buffer: int, new: list[Interval]) -> None:
        size, bit, held = self.size[buffer], self._bit[buffer], self.held_bytes
        for intervals, change in ((self.intervals[buffer], -size), (new, size)):
            for start, end in intervals:
                self._starts[start] ^= bit
                self._ends[end] ^= bit
                held[start + 1 : end + 1] += change
                self._turn_bit(bit, start + 1, end + 1)
        self.intervals[buffer] = new

    def _turn_bit(self, bit: int, first: int, end: int) -> None:
        """Hold a buffer at positions where it was not held, or the reverse."""
        besides, size = self._besides, self._block
        first_whole, end_whole = -(-first // size), end // size
        if first_whole < end_whole:
            throughout = self._throughout
            for block in range(first_whole, end_whole):
                throughout[block] ^= bit
            for position in range(end_whole * size, end):
                besides[position] ^= bit
            end = first_whole * size
        for position in range(first, end):
            besides[position] ^= bit

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
                before = 0
                for place in gone:
                    before |= self._used[place]
                self.set_intervals(buffer, new)
                todo.extend(self._buffers(before & ~self._bit[buffer]).tolist())

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
        return merged([*intervals, (latest, position)]), latest
