"""How likely is it that a weight is zero, and which value has one that is not?

Both are learnt from the weights before it: the file holds no tables, who decodes learns the same.
Rows are coded one after the other. A weight's place is likely where its column had weights before,
where some rows before have one in its column (in a layer that looks at images, those of the pixels
beside and above), and where its row has had more than all that lets expect (a gamma prior on a
factor per row).
Inside a row, cells are coded in segments that grow: each segment is one call of the coder.

What feeds the coder must be the same number on every machine, so that sums are taken over integers
(sums of floats depend on the width of a CPU's registers), and single floats are only multiplied
and divided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ONE = 1 << 20
_LEAST = 1.0 / (1 << 18)
_RATIO = 1 << 10
# What one row before the other can make of an expectation at most.
_LIKELIEST = _ONE - (_ONE >> 5)

MAX_LAG = 64
MAX_LAGS = 4


@dataclass(frozen=True)
class Weighing:
    """How much a tensor's past tells about its next row.

    Attributes:
        column: so many rows of average density stand before a column's own.
        row: so many expected weights stand before a row's own.
        neighbours: how much more a column learns from its own rows than from those of the columns
            beside it, in quarters: 4 is from its own alone.
        lags: how many rows before are the rows that are looked at.
    """

    column: int = 4
    row: int = 2
    neighbours: int = 4
    lags: tuple[int, ...] = ()


# What an encoder may choose among, lags aside; a file holds the number of one.
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
        self._past: deque[npt.NDArray[np.bool_]] = deque(maxlen=max(weighing.lags, default=1))
        self._seen = np.zeros(1 << len(weighing.lags), dtype=np.int64)
        self._expected = np.zeros_like(self._seen)
        self._columns: Integers = self._counts
        self._contexts: Integers = self._counts

    def begin_row(self) -> Integers:
        """Return the expected density of each cell of the next row, in units of 2^-20."""
        self._columns = self._from_columns()
        if not self.weighing.lags:
            return self._columns
        self._contexts = np.zeros(len(self._counts), dtype=np.int64)
        for bit, lag in enumerate(self.weighing.lags):
            if lag <= len(self._past):
                self._contexts |= self._past[-lag].astype(np.int64) << bit
        # In each context so many times as many weights as columns alone had let expect.
        ratios = (self._seen * _ONE + _ONE) * _RATIO // (self._expected + _ONE)
        expected: Integers = self._columns * ratios[self._contexts] // _RATIO
        return np.minimum(expected, np.maximum(self._columns, _LIKELIEST))

    def _from_columns(self) -> Integers:
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
            expected: of those cells, from `begin_row`.
            num_seen: weights in the row so far.
            num_expected: sum of the expected densities there.
        """
        prior = self.weighing.row
        factor = (num_seen + prior) * _ONE / (num_expected + prior * _ONE)
        likely: Floats = np.clip(expected * (factor / _ONE), _LEAST, 1.0 - _LEAST)
        return likely

    def learn(self, is_weight: npt.NDArray[np.bool_]) -> None:
        """Take note of a row that was coded."""
        if self.weighing.lags:
            # Sums of integers below 2^53 are exact as floats, too, in any order.
            num = len(self._seen)
            self._seen += np.bincount(self._contexts[is_weight], minlength=num)
            sums = np.bincount(self._contexts, weights=self._columns, minlength=num)
            self._expected += sums.astype(np.int64)
            self._past.append(is_weight.copy())
        self._counts += is_weight
        self._num_rows += 1


def likely_lags(is_weight: npt.NDArray[np.bool_]) -> list[int]:
    """Return lags at which columns' weights come together most, the most telling first.

    Args:
        is_weight: bool [rows, columns].
    """
    num_rows = len(is_weight)
    density = is_weight.mean(axis=0, dtype=np.float64)
    by_chance = float((density * density).sum())
    gains = []
    for lag in range(1, min(MAX_LAG, num_rows - 1) + 1):
        together = int(np.count_nonzero(is_weight[lag:] & is_weight[:-lag]))
        expected = by_chance * (num_rows - lag)
        gains.append(((together - expected) / max(1.0, expected) ** 0.5, lag))
    return [lag for gain, lag in sorted(gains, reverse=True)[:MAX_LAGS] if gain > 4]


class Values:
    """Which of some values comes next: counts so far, and a half each (Krichevsky, Trofimov).

    Args:
        num: of values.
        num_contexts: in each of which values are counted for themselves.
    """

    def __init__(self, num: int, num_contexts: int = 1) -> None:
        self._counts: Integers = np.zeros((num_contexts, num), dtype=np.int64)
        self._num_seen = 0

    def blocks(self, num: int) -> Iterator[tuple[int, int]]:
        """Yield the (begin, end) in which `num` values are coded; what was coded is learnt from."""
        begin = 0
        while begin < num:
            end = min(num, begin + max(8, self._num_seen // 4))
            yield begin, end
            begin = end

    def likely(self, contexts: Integers | None = None) -> Floats:
        """Return each value's probability, up to a factor: [num], or in contexts [M, num]."""
        counts = self._counts[0] if contexts is None else self._counts[contexts]
        likely: Floats = (2 * counts + 1).astype(np.float64)
        return likely

    def learn(self, values: npt.NDArray[Any], contexts: Integers | None = None) -> None:
        """Take note of values that were coded."""
        num_contexts, num = self._counts.shape
        places = values if contexts is None else contexts * num + values
        counts = np.bincount(places, minlength=num_contexts * num)
        self._counts += counts.reshape(self._counts.shape)
        self._num_seen += len(values)


class Signs:
    """The signs of the weights in up to two rows before, as a context of 3 or 9 for each cell.

    Args:
        num_columns: of a row.
        num_negative: codes from 1 up to this one stand for negative values.
        lags: how many rows before those are.
    """

    def __init__(self, num_columns: int, num_negative: int, lags: tuple[int, ...]) -> None:
        self._lags = lags[:2]
        self._num_negative = num_negative
        self._none: Integers = np.zeros(num_columns, dtype=np.int64)
        self._past: deque[Integers] = deque(maxlen=max(self._lags, default=1))
        self.num_contexts = 3 ** len(self._lags)

    def contexts(self) -> Integers:
        """Return each cell's context in the next row."""
        contexts = self._none
        for lag in self._lags:
            before = self._past[-lag] if lag <= len(self._past) else self._none
            contexts = 3 * contexts + before
        return contexts

    def learn(self, row: npt.NDArray[Any]) -> None:
        """Take note of a row of codes."""
        if self._lags:
            self._past.append(np.where(row > self._num_negative, 2, np.minimum(row, 1)))
