"""Which rows of a dimension each rank has, and which of them it needs: integers alone.

A dimension of `size` rows is cut as `torch.tensor_split` cuts: who has which rows follows from the
size, so that tensors of one size lie alike wherever they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Bounds = tuple[int, int]
# (first row, how many, step): step -1 goes backwards (reflect), 0 repeats one row (replicate).
Run = tuple[int, int, int]
# A first row that is none: rows of padding, filled with a number.
FILL = -1


def bounds_of(size: int, num_ranks: int) -> tuple[Bounds, ...]:
    """Return the rows [start, end) of each rank; the first ranks have one more where it is uneven.

    >>> bounds_of(10, 3)
    ((0, 4), (4, 7), (7, 10))
    """
    least, more = divmod(size, num_ranks)
    starts = [rank * least + min(rank, more) for rank in range(num_ranks + 1)]
    return tuple(zip(starts[:-1], starts[1:], strict=True))


@dataclass(frozen=True)
class Piece:
    """Consecutive rows that a rank needs, from one owner.

    Attributes:
        place: of the first among the rows that are needed.
        count: how many are needed.
        owner: the rank that has them; FILL for padding.
        first: the lowest of them among the owner's rows.
        step: as in a run.
    """

    place: int
    count: int
    owner: int
    first: int
    step: int

    @property
    def num_sent(self) -> int:
        """How many different rows these are."""
        return self.count if self.step else 1


@dataclass(frozen=True)
class RowMap:
    """What every rank needs of a dimension, in order, and who has it.

    Attributes:
        owned: each rank's rows.
        needed: each rank's runs.

    >>> rows = RowMap(bounds_of(8, 2), (runs_of([FILL, 0, 1, 2, 3, 4]), runs_of([3, 4, 5, 6, 7])))
    >>> rows.needed
    (((-1, 1, 1), (0, 5, 1)), ((3, 5, 1),))
    >>> rows.received(1)
    [Piece(place=0, count=1, owner=0, first=3, step=1)]
    """

    owned: tuple[Bounds, ...]
    needed: tuple[tuple[Run, ...], ...]

    def num_owned(self, rank: int) -> int:
        """Return how many rows a rank has."""
        first, end = self.owned[rank]
        return end - first

    def num_needed(self, rank: int) -> int:
        """Return how many rows a rank needs."""
        return sum(count for _, count, _ in self.needed[rank])

    @property
    def is_identity(self) -> bool:
        """Whether every rank needs what it has."""
        return all(
            runs == ((first, end - first, 1),)
            for runs, (first, end) in zip(self.needed, self.owned, strict=True)
        )

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Return what a rank needs, each piece of one owner."""
        return _pieces(self, rank)

    def exchanged(self, rank: int) -> tuple[list[int], list[int]]:
        """Return how many rows a rank sends to each, and gets from each."""
        gone, come = [0] * len(self.owned), [0] * len(self.owned)
        for other, piece in self.sent(rank):
            gone[other] += piece.num_sent
        for piece in self.received(rank):
            come[piece.owner] += piece.num_sent
        return gone, come

    def received(self, rank: int) -> list[Piece]:
        """Return what a rank needs of others: by owner, and of one owner in order."""
        foreign = [p for p in self.pieces(rank) if p.owner not in (rank, FILL)]
        return sorted(foreign, key=lambda piece: piece.owner)

    def sent(self, rank: int) -> list[tuple[int, Piece]]:
        """Return what others need of a rank, as (who, what), in the order of their ranks."""
        return [
            (other, piece)
            for other in range(len(self.owned)) if other != rank
            for piece in self.pieces(other) if piece.owner == rank
        ]

    def num_received(self, rank: int) -> int:
        """Return how many rows come to a rank from others."""
        return sum(piece.num_sent for piece in self.received(rank))

    def num_sent(self, rank: int) -> int:
        """Return how many rows go from a rank to others."""
        return sum(piece.num_sent for _, piece in self.sent(rank))

    @property
    def most_received(self) -> int:
        """How many rows come to the rank to which most come: all have room for as many."""
        return max(map(self.num_received, range(len(self.owned))))

    @property
    def most_sent(self) -> int:
        """How many rows go from the rank from which most go."""
        return max(map(self.num_sent, range(len(self.owned))))

    def encoded(self) -> list[int]:
        """Return it as numbers, the same on all ranks: what an operator can be given."""
        numbers = [len(self.owned)]
        for (first, end), runs in zip(self.owned, self.needed, strict=True):
            numbers += [first, end, len(runs), *(n for run in runs for n in run)]
        return numbers

    @classmethod
    def decoded(cls, numbers: Sequence[int]) -> RowMap:
        """Return what was encoded.

        >>> rows = RowMap(bounds_of(8, 2), (runs_of([1, 0, 1]), runs_of([7, 7])))
        >>> RowMap.decoded(rows.encoded()) == rows
        True
        """
        return _decoded(tuple(numbers))


@lru_cache(maxsize=4096)
def _pieces(rows: RowMap, rank: int) -> tuple[Piece, ...]:
    found: list[Piece] = []
    place = 0
    for first, count, step in rows.needed[rank]:
        if first == FILL:
            found.append(Piece(place, count, FILL, 0, 1))
            place += count
            continue
        done = 0
        while done < count:
            row = first + step * done
            owner = next(o for o, (a, b) in enumerate(rows.owned) if a <= row < b)
            start, end = rows.owned[owner]
            room = {1: end - row, -1: row - start + 1, 0: count}[step]
            taken = min(room, count - done)
            lowest = row - taken + 1 if step < 0 else row
            found.append(Piece(place, taken, owner, lowest - start, step))
            place, done = place + taken, done + taken
    return tuple(found)


@lru_cache(maxsize=4096)
def _decoded(numbers: tuple[int, ...]) -> RowMap:
    left = iter(numbers)
    owned, needed = [], []
    for _ in range(next(left)):
        owned.append((next(left), next(left)))
        needed.append(tuple((next(left), next(left), next(left)) for _ in range(next(left))))
    return RowMap(tuple(owned), tuple(needed))


def runs_of(rows: Iterable[int]) -> tuple[Run, ...]:
    """Return row numbers as runs.

    >>> runs_of([2, 1, 0, 1, 2, 2, 2, FILL, FILL])
    ((2, 3, -1), (1, 2, 1), (2, 2, 0), (-1, 2, 1))
    """
    runs: list[list[int]] = []
    for row in rows:
        last = runs[-1] if runs else None
        if last is not None and FILL in (row, last[0]):
            if row == last[0]:
                last[1] += 1
                continue
        elif last is not None:
            step = row - (last[0] + last[2] * (last[1] - 1))
            if abs(step) <= 1 and (last[1] == 1 or step == last[2]):
                last[1:] = [last[1] + 1, step]
                continue
        runs.append([row, 1, 1])
    return tuple((first, count, step) for first, count, step in runs)
