"""How a parameter is cut between ranks: each has some of its rows, or one of them has all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, gcd, prod


class Placement(StrEnum):
    """What of a parameter lies in pieces with all ranks (ZeRO-1, 2 and 3).

    STATE: the optimizer's state; each rank updates its rows, and then shares them. GRADIENT: what
    is accumulated, or waits for an update, too. PARAMETER: its values, too, which are gathered
    around their uses.
    """

    STATE = "state"
    GRADIENT = "gradient"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Which rows of a parameter, along its first dimension, each rank keeps and updates.

    Attributes:
        shape: of the whole parameter.
        rows: of each rank: the first one, and the one behind the last.

    >>> Pieces.even((5, 3), 2)
    Pieces(shape=(5, 3), rows=((0, 3), (3, 5)))
    >>> Pieces.of_owner((5, 3), 2, 1).num_rows(0)
    0
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, shape: tuple[int, ...], num_ranks: int, unit: int = 1) -> Pieces:
        """Return pieces of as many rows, as `torch.chunk` and `Shard(0)` cut; the last has fewer.

        Args:
            shape: of the parameter.
            num_ranks: how many pieces; the last ones may have no rows.
            unit: pieces begin at multiples of so many elements.
        """
        row_unit = unit // gcd(unit, prod(shape[1:]))
        each = ceil(ceil(shape[0] / num_ranks) / row_unit) * row_unit
        ends = [min(each * rank, shape[0]) for rank in range(num_ranks + 1)]
        return cls(shape, tuple(zip(ends, ends[1:], strict=False)))

    @classmethod
    def of_owner(cls, shape: tuple[int, ...], num_ranks: int, owner: int) -> Pieces:
        """Return a whole parameter of one rank."""
        ends = [0 if rank <= owner else shape[0] for rank in range(num_ranks + 1)]
        return cls(shape, tuple(zip(ends, ends[1:], strict=False)))

    def num_rows(self, rank: int) -> int:
        """Return how many rows a rank has."""
        first, end = self.rows[rank]
        return end - first

    def num_elements(self, rank: int) -> int:
        """Return how many elements a rank has."""
        return self.num_rows(rank) * prod(self.shape[1:])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different numbers of rows that ranks have, without none."""
        return tuple(sorted({self.num_rows(rank) for rank in range(len(self.rows))} - {0}))

    @property
    def most_rows(self) -> int:
        """How many the rank with most has."""
        return self.sizes[-1]


def segments(pieces: Iterable[Pieces]) -> tuple[int, ...]:
    """Return where ranks' parts of a buffer end in which pieces lie, each rank's together.

    >>> segments([Pieces.even((4, 2), 2), Pieces.even((3,), 2)])
    (6, 11)
    """
    pieces, end, ends = list(pieces), 0, []
    for rank in range(len(pieces[0].rows)):
        end += sum(one.num_elements(rank) for one in pieces)
        ends.append(end)
    return tuple(ends)
