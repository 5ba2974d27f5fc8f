"""What each position of a step runs again, costs and holds, for what is kept in memory where.

The plain step's operations are positions 0..n-1. Before each of them, whatever it needs and is not
in memory is recomputed (and, where that needs dropped buffers in turn, those too).

Sets of buffers are bit masks, the bits in the order in which buffers are first made: the highest
bit of what is missing has the latest maker, so what is to be recomputed is found in reverse order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from packlight.planner.facts import Facts
from packlight.planner.held import Held
from packlight.planner.intervals import Interval
from packlight.step import StepGraph

# What a position runs again, what it finds in memory, what it reads in all; its peak and seconds.
Result = tuple[tuple[int, ...], int, int, int, float]
# Which buffers play a part; which of them are held, end, come back elsewhere, start; what becomes
# of a position; what it lacks.
Remembered = tuple[int, tuple[int, int, int, int], Result, list[int]]
INFEASIBLE = 1 << 60
NUM_REMEMBERED = 6


class Positions:
    """What each position costs; re-evaluated one by one, and taken back.

    Attributes:
        held: what is in memory when each position starts.
        local_bytes: for each position, the most it adds to that while it runs.
        extra_seconds: for each position, seconds of recomputation before it.
        lists: for each position, what it runs again, in order.
        used_at: for each buffer, where it is found in memory and used.
        rerun_at: for each operation, where it is run again.
        origin: which operation makes each buffer first.
        maker: which one makes it again (`TransferRetention` has other ways to come by a buffer).
        num_evaluations, num_looks: positions worked out so far (16 recomputations there count as
            one more), the measure of effort; looks at whether something could be held, which are
            cheaper, are counted besides.
    """

    def __init__(self, graph: StepGraph, facts: Facts | None = None) -> None:
        """Prepare positions that find nothing in memory.

        Args:
            graph: the step.
            facts: about it, where they are at hand.
        """
        self._facts = facts = facts or Facts(graph)
        self.graph = graph
        operations = graph.computations
        self.num_positions = n = len(operations)
        # Lists of their own: `TransferRetention` adds to them.
        self.size = facts.size
        self.reads, self.overwrites = list(facts.reads), list(facts.overwrites)
        self.creates = [o.creates for o in operations]
        self.seconds = [o.seconds for o in operations]
        self.grows, self.can_recompute = list(facts.grows), list(facts.can_recompute)
        self.first_chance = list(range(n))  # after its own position
        self.last_chance, self.origin = list(facts.last_chance), facts.maker
        self.maker = list(facts.maker)
        self.held = Held(n)
        self.lists: list[tuple[int, ...]] = [()] * n
        self.used_at: list[set[int]] = [set() for _ in graph.buffers]
        self.rerun_at: dict[int, set[int]] = {}
        self.local_bytes: npt.NDArray[np.int64] = np.zeros(n, dtype=np.int64)
        self.extra_seconds: npt.NDArray[np.float64] = np.zeros(n)
        self.num_evaluations = self.num_looks = 0
        # -- as masks
        self._by_rank, self._bit, self._bytes_of = facts.by_rank, facts.bit, facts.bytes_of
        self._reads, self._creates = list(facts.reads_masks), list(facts.creates_masks)
        # What each position finds in memory of what is read there, and all that is.
        self._used, self._touched = [0] * n, [0] * n
        # What a position lacked that cannot be made again, when it was last evaluated.
        self._lacking: dict[int, list[int]] = {}
        self._results: list[Result] = [((), 0, 0, 0, 0.0)] * n
        # The latest answers; `_turned`: what comes back otherwise than from where it was made.
        self._remembered: list[list[Remembered]] = [[] for _ in range(n)]
        self._turned = 0
        self._journal: list[tuple[int, list[Interval] | None, Result | None]] = []

    # -- reading

    @property
    def peaks(self) -> npt.NDArray[np.int64]:
        """Peak during each position."""
        return self.held.bytes[: self.num_positions] + self.local_bytes

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

    def used_by(self, position: int) -> list[int]:
        """Return the buffers that a position finds in memory and uses, by id."""
        return self._facts.buffers_of(self._used[position])

    def is_read_at(self, buffer: int, position: int) -> bool:
        """Whether a position or what it runs again reads a buffer, or it stays from there on."""
        return self._touched[position] & self._bit[buffer] != 0

    # -- one position

    def evaluate(self, position: int) -> bool:
        """Work out what a position recomputes, costs and holds; return whether it can run."""
        before, result = self._results[position], self._worked_out(position)
        if result is not before:
            self._journal.append((position, None, before))
            self._store(position, result)
        return not self._lacking[position]

    def _worked_out(self, position: int) -> Result:
        """Return what a position recomputes, costs and holds.

        Moves are tried and taken back, so the same is asked again and again. Answers are remembered
        with what they depend on: which of the buffers that play a part there are held, end there,
        and come back otherwise than from where they were made; which start there.
        """
        held, starts = self.held.at(position), self.held.starts[position]
        ends, turned = self.held.ends[position], self._turned
        remembered = self._remembered[position]
        for asked, known, result, lacking in remembered:
            if known == (held & asked, ends & asked, turned & asked, starts):
                self.num_evaluations += 1 + len(result[0]) // 16
                self._lacking[position] = lacking
                return result
        result = self._worked_out_anew(position, held, starts)
        asked = result[2] | self._creates[position]
        for index in result[0]:
            asked |= self._creates[index]
        known = held & asked, ends & asked, turned & asked, starts
        remembered.insert(0, (asked, known, result, self._lacking[position]))
        del remembered[NUM_REMEMBERED:]
        return result

    def _worked_out_anew(self, position: int, held: int, starts: int) -> Result:
        touched = self._reads[position]
        if starts:
            touched |= starts & ~self._creates[position]
        self.num_evaluations += 1
        sequence: tuple[int, ...] = ()
        lacking: list[int] = []
        extra = 0.0
        if touched & ~held:
            rerun, touched, lacking = self._brought_back(position, touched, held)
            sequence = self.arranged(rerun, position) if rerun else ()
            seconds = self.seconds
            extra = sum([seconds[i] for i in sequence])
            self.num_evaluations += len(sequence) // 16
        self._lacking[position] = lacking
        if lacking:
            local, extra = INFEASIBLE, 0.0
        elif sequence:
            local = self._local_peak(position, sequence, held)
        else:
            local = self._own_peak(position, held)
        return sequence, touched & held, touched | starts, local, extra

    def _brought_back(
        self, position: int, touched: int, held: int
    ) -> tuple[list[int], int, list[int]]:
        """Return what brings back what a position lacks, the latest makers first.

        Args:
            position: where.
            touched: what it reads itself, and what is held from there on.
            held: what it finds in memory.

        Returns:
            Operations; what is touched by them, too; buffers that nothing can bring back there.
        """
        maker, by_rank, reads, creates = self.maker, self._by_rank, self._reads, self._creates
        can_recompute = self.can_recompute
        first_chance, last_chance = self.first_chance, self.last_chance
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
        return rerun, touched, lacking

    def arranged(self, rerun: list[int], position: int) -> tuple[int, ...]:
        """Return in which order a position runs what it runs again.

        Args:
            rerun: that, the latest makers first.
            position: where.
        """
        return tuple(rerun[::-1])

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
        self._results[position] = result
        self.local_bytes[position] = local
        self.extra_seconds[position] = extra

    def _own_peak(self, position: int, held: int) -> int:
        """Return the most that a position adds to what is held when it runs nothing again."""
        peak = self.grows[position]
        for victim, created in self.overwrites[position]:
            bit = self._bit[victim]
            if bit & (self.held.ends[position] | ~held) & ~self.held.starts[position]:
                return peak - self.size[created]
        return peak

    def _local_peak(self, position: int, sequence: tuple[int, ...], held: int) -> int:
        """Return the most that a position adds to what is held when it starts.

        Backwards: the most from a step on is what it needs itself, or what it leaves behind and the
        most from the next one on.
        """
        bit, reads, creates, bytes_of = self._bit, self._reads, self._creates, self._bytes_of
        # What leaves memory after its last read here: held no longer, or made for this place only.
        mortal = (self.held.ends[position] | ~held) & ~self.held.starts[position]
        stays = ~mortal
        wanted = peak = 0
        for index in (position, *sequence[::-1]):
            during = self.grows[index]
            change = bytes_of[creates[index] & (wanted | stays)]
            dying = reads[index] & ~(wanted | stays)
            if dying:
                wanted |= dying
                for victim, created in self.overwrites[index]:
                    if bit[victim] & dying:
                        during -= self.size[created]
                        break
                change -= bytes_of[dying]
            peak = max(during, peak + change)
        return peak
