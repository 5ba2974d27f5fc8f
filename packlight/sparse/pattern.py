"""Which elements of a weight are stored: an index of about one byte for each.

The weight is a matrix, one row for each output, cut into blocks of 255 columns. The index is one
uint8 vector: first how many nonzeros each block has, row after row, then each nonzero's offset in
its block. So a pattern with n nonzeros takes n + rows * blocks bytes, whichever they are: 1.04
bytes for each at 10% of wide rows, 1.4 at 1%. Values lie in the same order: rows, then columns.

A weight may have more room than nonzeros; what is behind the last nonzero is zero and never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from packlight.errors import SparsePatternError

BLOCK = 255


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a weight of any shape as a matrix."""
    return int(shape[0]), prod(map(int, shape[1:]))


def num_blocks(shape: Sequence[int]) -> int:
    """Return how many blocks a weight has, which is how many counts its index begins with."""
    rows, columns = matrix_shape(shape)
    return rows * -(-columns // BLOCK)


def parts(index: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (counts of shape (rows, blocks), offsets), views of an index."""
    blocks = num_blocks(shape)
    return index[:blocks].view(int(shape[0]), -1), index[blocks:]


def row_starts(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return at which nonzero each row starts, and their number: int32 of rows + 1 elements."""
    counts, _ = parts(index, shape)
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=index.device)
    torch.cumsum(counts.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=starts[1:])
    return starts


def num_nonzeros(index: torch.Tensor, shape: Sequence[int]) -> int:
    """Return how many elements are stored."""
    return int(parts(index, shape)[0].sum(dtype=torch.int64))


def encode(positions: torch.Tensor, shape: Sequence[int], room: int | None = None) -> torch.Tensor:
    """Return the index of a pattern.

    Args:
        positions: of the nonzeros in the flattened weight, ascending, int64.
        shape: of the weight.
        room: for so many nonzeros; as many as there are if None.
    """
    rows, columns = matrix_shape(shape)
    blocks_per_row = -(-columns // BLOCK)
    row = positions.div(columns, rounding_mode="floor")
    column = positions - row * columns
    block = column.div(BLOCK, rounding_mode="floor")
    index = torch.zeros(
        rows * blocks_per_row + (len(positions) if room is None else room),
        dtype=torch.uint8, device=positions.device,
    )
    counts = torch.bincount(row * blocks_per_row + block, minlength=rows * blocks_per_row)
    index[: len(counts)] = counts.to(torch.uint8)
    index[len(counts) : len(counts) + len(positions)] = (column - block * BLOCK).to(torch.uint8)
    return index


def decode(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the positions of the nonzeros in the flattened weight, ascending, int64.

    >>> index = encode(torch.tensor([1, 300, 301, 799]), (2, 400))
    >>> index.tolist(), decode(index, (2, 400)).tolist()
    ([1, 2, 0, 1, 1, 45, 46, 144], [1, 300, 301, 799])
    """
    rows, columns = matrix_shape(shape)
    counts, offsets = parts(index, shape)
    starts = torch.arange(0, columns, BLOCK, device=index.device).repeat(rows, 1)
    starts += torch.arange(rows, device=index.device)[:, None] * columns
    positions = starts.reshape(-1).repeat_interleave(counts.reshape(-1).to(torch.int64))
    return positions.add_(offsets[: len(positions)])


def decode_rows(
    index: torch.Tensor, shape: Sequence[int], starts: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Return the positions of the nonzeros of some rows in these rows, flattened.

    Args:
        index: of the weight.
        shape: of the weight.
        starts: see `row_starts`.
        first: row.
        last: the row behind the last one.
    """
    counts, offsets = parts(index, shape)
    mine = offsets[int(starts[first]) : int(starts[last])]
    part = torch.cat([counts[first:last].reshape(-1), mine])
    return decode(part, (last - first, matrix_shape(shape)[1]))


def check_pattern(
    name: str, values: torch.Tensor, index: torch.Tensor, shape: Sequence[int]
) -> None:
    """Refuse an index that kernels would misread.

    Raises:
        SparsePatternError: it says what does not fit.
    """

    def refuse(problem: str) -> None:
        raise SparsePatternError(name, tuple(shape), problem)

    blocks, (rows, columns) = num_blocks(shape), matrix_shape(shape)
    if index.dtype != torch.uint8 or index.ndim != 1 or values.ndim != 1:
        refuse(
            f"the index is {index.dtype} of shape {tuple(index.shape)} and the values of shape "
            f"{tuple(values.shape)}; they are vectors, the index torch.uint8"
        )
    if len(index) != blocks + len(values):
        refuse(
            f"the index has {len(index)} bytes; {rows} rows of {columns} columns with "
            f"{len(values)} values take {blocks + len(values)}"
        )
    stored = num_nonzeros(index, shape)
    if stored > len(values):
        refuse(f"its blocks count {stored} nonzeros, and there are {len(values)} values")
    if not stored:
        return
    offsets = parts(index, shape)[1][:stored]
    positions = decode(index, shape)
    if int(offsets.max()) >= BLOCK or bool((positions.diff() <= 0).any()):
        refuse("offsets do not ascend within their blocks")
    row = torch.arange(rows, device=index.device).repeat_interleave(
        parts(index, shape)[0].sum(1, dtype=torch.int64)
    )
    if bool((positions.div(columns, rounding_mode="floor") != row).any()):
        refuse(f"a nonzero lies behind the last of {columns} columns")
