"""What is in memory where: sets of buffers, as bit masks, along the positions of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from packlight.planner.intervals import Interval

MIN_BLOCK = 8


class Held:
    """Which buffers are in memory when each position starts, for changing intervals.

    Positions are in blocks: a buffer that is held throughout a block is noted there once, otherwise
    at each position. So both a look and a change take about as many steps as the root of positions.

    Attributes:
        bytes: for each position, bytes in memory when it starts.
        starts, ends: for each position, the set of the buffers whose intervals start or end there.
    """

    def __init__(self, num_positions: int) -> None:
        """Hold nothing anywhere."""
        self.bytes: npt.NDArray[np.int64] = np.zeros(num_positions + 2, dtype=np.int64)
        self.starts, self.ends = [0] * (num_positions + 1), [0] * (num_positions + 1)
        self._block = max(MIN_BLOCK, math.isqrt(num_positions))
        self._throughout = [0] * (num_positions // self._block + 2)
        self._besides = [0] * (num_positions + 2)

    def fill(self, found: list[list[Interval]], sizes: Sequence[int], bits: Sequence[int]) -> None:
        """Hold all buffers in their intervals, where nothing was held before.

        Args:
            found: intervals of each buffer.
            sizes: bytes of each.
            bits: the bit of each in a set.
        """
        for intervals, size, bit in zip(found, sizes, bits, strict=False):
            for start, end in intervals:
                self.starts[start] |= bit
                self.ends[end] |= bit
                self.bytes[start + 1 : end + 1] += size
        held = 0
        for position, (start_set, end_set) in enumerate(zip(self.starts, self.ends, strict=True)):
            self._besides[position] = held
            held = (held & ~end_set) | start_set

    def at(self, position: int) -> int:
        """Return the set of buffers that are in memory when a position starts."""
        return self._throughout[position // self._block] ^ self._besides[position]

    def change(self, bit: int, size: int, old: list[Interval], new: list[Interval]) -> None:
        """Hold a buffer in other intervals than before."""
        for intervals, change in ((old, -size), (new, size)):
            for start, end in intervals:
                self.starts[start] ^= bit
                self.ends[end] ^= bit
                self.bytes[start + 1 : end + 1] += change
                self._turn(bit, start + 1, end + 1)

    def _turn(self, bit: int, first: int, end: int) -> None:
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
