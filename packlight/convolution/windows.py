"""Which rows of a layer's input each rank needs for its rows of the result: integers alone.

Everything follows from the size of the whole: strides that fit no shard, padding of any mode and
uneven shards are nothing special.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packlight.ranks.rows import FILL, RowMap, Run, bounds_of, runs_of


@dataclass(frozen=True)
class Window:
    """What one row of a convolution's or a pooling layer's result looks at.

    Attributes:
        kernel: rows of the kernel.
        stride: rows between neighbours' windows.
        dilation: rows between the kernel's.
        pad: rows of padding before the first row.
        mode: of the padding: "zeros" (of whatever number), "reflect", "replicate" or "circular".
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    pad: int = 0
    mode: str = "zeros"

    @property
    def span(self) -> int:
        """How many rows a window reaches over."""
        return (self.kernel - 1) * self.dilation + 1


def window_map(size: int, out_size: int, num_ranks: int, window: Window) -> RowMap:
    """Return what each rank needs for its rows of a convolution's result.

    Row o of it looks at rows o * stride - pad + k * dilation, for k < kernel.

    Args:
        size: of the input, on all ranks together.
        out_size: of the result.
        num_ranks: how many share them.
        window: what a row looks at.

    >>> window_map(8, 8, 2, Window(kernel=3, pad=1)).needed
    (((-1, 1, 1), (0, 5, 1)), ((3, 5, 1), (-1, 1, 1)))
    """

    def needed(first: int, end: int) -> tuple[Run, ...]:
        start = first * window.stride - window.pad
        return runs_of(
            padded_row(row, size, window.mode)
            for row in range(start, start + (end - first - 1) * window.stride + window.span)
        )

    return map_of(size, out_size, num_ranks, needed)


def map_of(
    size: int, out_size: int, num_ranks: int, needed: Callable[[int, int], tuple[Run, ...]]
) -> RowMap:
    """Return a map, given what rows [first, end) of the result need."""
    bounds = bounds_of(out_size, num_ranks)
    return RowMap(
        bounds_of(size, num_ranks), tuple(needed(a, b) if b > a else () for a, b in bounds)
    )


def padded_row(row: int, size: int, mode: str) -> int:
    """Return which row lies at a place that may be outside of the rows; FILL for none.

    >>> [padded_row(-2, 8, mode) for mode in ("zeros", "reflect", "replicate", "circular")]
    [-1, 2, 0, 6]
    """
    if 0 <= row < size:
        return row
    if mode == "zeros":
        return FILL
    if mode == "reflect":
        return -row if row < 0 else 2 * (size - 1) - row
    if mode == "replicate":
        return min(max(row, 0), size - 1)
    assert mode == "circular", mode
    return row % size


@dataclass(frozen=True)
class Cropped:
    """Rows that a layer makes of what it needs, some of which are no rows of this rank's.

    Attributes:
        rows: what is needed.
        before: how many of the rows that are made lie before this rank's first, for each rank.
    """

    rows: RowMap
    before: tuple[int, ...]


def transposed_map(size: int, out_size: int, num_ranks: int, window: Window) -> Cropped:
    """Return what each rank needs for its rows of a transposed convolution's result.

    Row i of the input adds to rows i * stride - pad + k * dilation, for k < kernel. Rows before the
    first and behind the last are zeros, and add nothing.
    """
    reach = window.span - 1
    before: list[int] = []

    def needed(first: int, end: int) -> tuple[Run, ...]:
        start = (first + window.pad - reach) // window.stride
        last = max(
            (end - 1 + window.pad) // window.stride,
            -(-(end - 1 + window.pad - reach) // window.stride),
        )
        before.append(first - (start * window.stride - window.pad))
        return runs_of(padded_row(row, size, "zeros") for row in range(start, last + 1))

    rows = map_of(size, out_size, num_ranks, needed)
    return Cropped(rows, tuple(before))


def repeated_map(size: int, factor: int, num_ranks: int) -> Cropped:
    """Return what each rank needs where each row becomes `factor` of them."""
    before: list[int] = []

    def needed(first: int, end: int) -> tuple[Run, ...]:
        start = first // factor
        before.append(first - start * factor)
        return ((start, -(-end // factor) - start, 1),)

    rows = map_of(size, size * factor, num_ranks, needed)
    return Cropped(rows, tuple(before))
