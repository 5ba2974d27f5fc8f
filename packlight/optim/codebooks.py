"""The levels that a value divided by its block's largest magnitude is rounded to.

8 bits: the dynamic map of Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization":
decade i of 7 is cut into 2^i equal cells (signed) or 2^(i+1) (unsigned) whose midpoints are levels,
so that large values are fine and small ones keep their magnitude; 0 and 1 are levels, too.
4 bits: Li et al. 2023, "Memory Efficient Optimizers with 4-bit States": the same map with three
decades for a first moment; for a second one 1/16, 2/16, .. 1, without zero, since a second moment
that is rounded to zero makes the next update explode.

Two differences from the first paper, in its maps. A value gets the level of the cell
it is in, where it searches the nearest one: that differs right above a power of ten, where the
nearest may be the last level of the finer decade, never by more than half a cell, and needs no
search. And an unsigned value that is not zero never gets the level zero, for the reason that Li
et al. give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Cells begin this share of a cell early. A block's largest value times the reciprocal of itself may
# round to less than 1, which must not cost it its level: it would shrink in every step.
_NUDGE = 1e-4


@dataclass(frozen=True)
class DynamicMap:
    """A dynamic map.

    Attributes:
        edges: where each decade begins.
        num_cells: in each decade.
        magnitudes: levels that are not negative, sorted: 0, the midpoints of the cells, 1.
    """

    edges: tuple[float, ...]
    num_cells: tuple[int, ...]
    magnitudes: tuple[float, ...]

    @property
    def lines(self) -> tuple[tuple[float, ...], ...]:
        """One line for each decade, of a value's code and of a code's level.

        Returns:
            (slopes, offsets, heights, shifts): the code of a magnitude is `int(value * slope +
            offset)` for the decade in which that is lowest, the magnitude of a code
            `(code + 0.5) * height + shift` for the one in which that is highest, but not below 0
            nor above 1.
        """
        first = np.cumsum((1, *self.num_cells[:-1]))  # code of a decade's first cell
        cells = list(zip(first, self.num_cells, self.edges, strict=True))
        slopes = tuple(n / (9 * edge) for _, n, edge in cells)
        offsets = tuple(float(f - n / 9) + _NUDGE for f, n, _ in cells)
        heights = tuple(9 * edge / n for _, n, edge in cells)
        shifts = tuple(float(edge - f * 9 * edge / n) for f, n, edge in cells)
        return slopes, offsets, heights, shifts

    @property
    def num_negative(self) -> int:
        """How many levels the signed map has below zero: 0 and 1 have no negative."""
        return len(self.magnitudes) - 2

    @property
    def signed(self) -> tuple[float, ...]:
        """All levels of the signed map, sorted by code."""
        return (*(-m for m in reversed(self.magnitudes[1:-1])), *self.magnitudes)


def dynamic_map(num_decades: int, cells_in_first: int) -> DynamicMap:
    """Return the map whose last decade ends at 1 and in which cells double from each to the next.

    Args:
        num_decades: powers of ten.
        cells_in_first: cells in the smallest decade.

    >>> dynamic_map(2, 1).magnitudes
    (0.0, 0.055, 0.325, 0.775, 1.0)
    """
    edges = tuple(10.0 ** (d - num_decades) for d in range(num_decades))
    num_cells = tuple(cells_in_first * 2**d for d in range(num_decades))
    levels = [0.0]
    for edge, n in zip(edges, num_cells, strict=True):
        levels += [edge * (1 + 9 * (cell + 0.5) / n) for cell in range(n)]
    return DynamicMap(edges, num_cells, tuple(round(v, 15) for v in (*levels, 1.0)))


SIGNED_8BIT = dynamic_map(7, 1)
UNSIGNED_8BIT = dynamic_map(7, 2)
SIGNED_4BIT = dynamic_map(3, 1)
LINEAR_4BIT = tuple((code + 1) / 16 for code in range(16))
