"""How likely is it that a weight is zero, and which value has one that is not?

Both are learnt from the weights before it: the file holds no tables, who decodes learns the same.
Rows are coded one after the other. A weight's place is likely where its column had weights before,
and where its row has had more than its columns let expect (a gamma prior on a factor per row).
Inside a row, cells are coded in segments that grow: each segment is one call of the coder.

What feeds the coder must be the same number on every machine, so that sums are taken over integers
(sums of floats depend on the width of a CPU's registers), and single floats are only multiplied
and divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ONE = 1 << 20
_LEAST = 1.0 / (1 << 18)


@dataclass(frozen=True)
class Weighing:
    """How much a tensor's past tells about its next row.

    Attributes:
        column: so many rows of average density stand before a column's own.
        row: so many expected weights stand before a row's own.
        neighbours: how much more a column learns from its own rows than from those of the columns
            beside it, in quarters: 4 is from its own alone.
    """

    column: int = 4
    row: int = 2
    neighbours: int = 4


# What an encoder may choose among; a file holds the number of one.
WEIGHINGS = [
    Weighing(column, row, neighbours)
    for neighbours in (4, 3, 2)
    for column in (2, 4, 20)
    for row in (1, 2, 12)
]


class Positions:
    """Where the weights of a tensor's rows are.

    Args:
        num_columns: of a row.
        density: the share of weights that are not zero.
        weighing: of the past.
    """

    def __init__(self, num_columns: int, density: float, weighing: Weighing) -> None:
        self.weighing = weighing
        self._density = max(1, int(density * _ONE))
        self._counts: Integers = np.zeros(num_columns, dtype=np.int64)
        self._num_rows = 0

    def columns(self) -> Integers:
        """Return each column's expected density in units of 2^-20."""
        own, strength = self.weighing.neighbours, self.weighing.column
        counts = 4 * self._counts
        if own < 4:
            beside = np.zeros_like(counts)
            beside[1:] += self._counts[:-1]
            beside[:-1] += self._counts[1:]
            counts = own * self._counts + (4 - own) * beside // 2
        expected: Integers = (counts * (_ONE // 4) + strength * self._density) // (
            self._num_rows + strength
        )
        return expected

    def segments(self) -> Iterator[tuple[int, int]]:
        """Yield the (begin, end) in which a row is coded."""
        begin, size, num = 0, 16, len(self._counts)
        while begin < num:
            yield begin, min(begin + size, num)
            begin += size
            size = min(2 * size, max(64, num // 16))

    def likely(self, expected: Integers, num_seen: int, num_expected: int) -> Floats:
        """Return the probability that cells of a segment are weights.

        Args:
            expected: of those cells, from `columns`.
            num_seen: weights in the row so far.
            num_expected: sum of the expected densities there.
        """
        prior = self.weighing.row
        factor = (num_seen + prior) * _ONE / (num_expected + prior * _ONE)
        likely: Floats = np.clip(expected * (factor / _ONE), _LEAST, 1.0 - _LEAST)
        return likely

    def learn(self, is_weight: npt.NDArray[np.bool_]) -> None:
        """Take note of a row that was coded."""
        self._counts += is_weight
        self._num_rows += 1


class Values:
    """Which of `num` values comes next: counts so far, and a half each (Krichevsky, Trofimov)."""

    def __init__(self, num: int) -> None:
        self._counts: Integers = np.zeros(num, dtype=np.int64)
        self._num_seen = 0

    def blocks(self, num: int) -> Iterator[tuple[int, int]]:
        """Yield the (begin, end) in which `num` values are coded; what was coded is learnt from."""
        begin = 0
        while begin < num:
            end = min(num, begin + max(8, self._num_seen // 4))
            yield begin, end
            begin = end

    def likely(self) -> Floats:
        """Return each value's probability, up to a factor."""
        likely: Floats = (2 * self._counts + 1).astype(np.float64)
        return likely

    def learn(self, values: npt.NDArray[Any]) -> None:
        """Take note of values that were coded."""
        self._counts += np.bincount(values, minlength=len(self._counts))
        self._num_seen += len(values)
