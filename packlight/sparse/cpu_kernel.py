"""Products with a weight of which only nonzeros are stored, on the CPU.

A row of the weight is read block by block: its nonzeros' places are decoded into a few hundred
bytes, then four nonzeros at a time are multiplied with contiguous vectors (see `geometry`). Nothing
dense is ever made of the weight. Each result is summed in an order that depends on the sizes
alone, so the number of threads changes no bit.

Numba compiles this file once per machine (some seconds) and keeps the result on disk, until this
very file changes; so it imports no constants.
"""
# The compiled functions have no annotations that numba would use.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 255


@njit(nogil=True, error_model="numpy", inline="always")
def _decode(offsets, first, count, block, places, base, out):
    """Write where the vectors of a block's nonzeros start."""
    for i in range(count):
        out[i] = base + places[block * BLOCK + np.int64(offsets[first + i])]


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _add_four(y, a, b, c, d, v0, v1, v2, v3):
    for i in range(y.size):
        y[i] += v0 * a[i] + v1 * b[i] + v2 * c[i] + v3 * d[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _add_one(y, a, v):
    for i in range(y.size):
        y[i] += v * a[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _dot_four(y, a, b, c, d):
    s0 = s1 = s2 = s3 = np.float32(0)
    for i in range(y.size):
        s0 += y[i] * a[i]
        s1 += y[i] * b[i]
        s2 += y[i] * c[i]
        s3 += y[i] * d[i]
    return s0, s1, s2, s3


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _dot_one(y, a):
    s = np.float32(0)
    for i in range(y.size):
        s += y[i] * a[i]
    return s


@njit(nogil=True, cache=True, error_model="numpy")
def multiply(
    first_row, last_row, chunk, length, values, counts, offsets, row_starts, places, group_rows,
    group_pitch, x, y,
):  # fmt: skip
    """Add to rows `first_row` to `last_row` (not included) of y (rows, pitch) their products."""
    num_blocks = counts.shape[1]
    where = np.empty(BLOCK, np.int64)
    for begin in range(0, length, chunk):
        size = min(chunk, length - begin)
        for row in range(first_row, last_row):
            out = y[row, begin : begin + size]
            base = (row // group_rows) * group_pitch + begin
            p = np.int64(row_starts[row])
            for block in range(num_blocks):
                count = np.int64(counts[row, block])
                _decode(offsets, p, count, block, places, base, where)
                i = 0
                while i + 4 <= count:
                    a, b, c, d = where[i], where[i + 1], where[i + 2], where[i + 3]
                    _add_four(
                        out, x[a : a + size], x[b : b + size], x[c : c + size], x[d : d + size],
                        values[p + i], values[p + i + 1], values[p + i + 2], values[p + i + 3],
                    )  # fmt: skip
                    i += 4
                while i < count:
                    a = where[i]
                    _add_one(out, x[a : a + size], values[p + i])
                    i += 1
                p += count


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_transposed(
    first_column, last_column, chunk, length, values, counts, offsets, row_starts, places,
    group_rows, group_pitch, dx, dy,
):  # fmt: skip
    """Add to the vectors of columns `first_column` to `last_column` (not included) of dx."""
    num_blocks = counts.shape[1]
    first_block, last_block = first_column // BLOCK, min((last_column - 1) // BLOCK + 1, num_blocks)
    where = np.empty(BLOCK, np.int64)
    for begin in range(0, length, chunk):
        size = min(chunk, length - begin)
        for row in range(counts.shape[0]):
            grown = dy[row, begin : begin + size]
            base = (row // group_rows) * group_pitch + begin
            p = np.int64(row_starts[row])
            for block in range(first_block):
                p += np.int64(counts[row, block])
            for block in range(first_block, last_block):
                count = np.int64(counts[row, block])
                _decode(offsets, p, count, block, places, base, where)
                for i in range(count):
                    column = block * BLOCK + np.int64(offsets[p + i])
                    if first_column <= column < last_column:
                        a = where[i]
                        _add_one(dx[a : a + size], grown, values[p + i])
                p += count


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_at_pattern(
    first_row, last_row, chunk, length, gradient, counts, offsets, row_starts, places, group_rows,
    group_pitch, x, dy,
):  # fmt: skip
    """Add to each nonzero's gradient the dot product of its row of dy with its column's vector."""
    num_blocks = counts.shape[1]
    where = np.empty(BLOCK, np.int64)
    for begin in range(0, length, chunk):
        size = min(chunk, length - begin)
        for row in range(first_row, last_row):
            grown = dy[row, begin : begin + size]
            base = (row // group_rows) * group_pitch + begin
            p = np.int64(row_starts[row])
            for block in range(num_blocks):
                count = np.int64(counts[row, block])
                _decode(offsets, p, count, block, places, base, where)
                i = 0
                while i + 4 <= count:
                    a, b, c, d = where[i], where[i + 1], where[i + 2], where[i + 3]
                    s0, s1, s2, s3 = _dot_four(
                        grown, x[a : a + size], x[b : b + size], x[c : c + size], x[d : d + size]
                    )
                    gradient[p + i] += s0
                    gradient[p + i + 1] += s1
                    gradient[p + i + 2] += s2
                    gradient[p + i + 3] += s3
                    i += 4
                while i < count:
                    a = where[i]
                    gradient[p + i] += _dot_one(grown, x[a : a + size])
                    i += 1
                p += count


@njit(nogil=True, cache=True, error_model="numpy")
def look_up(first, last, values, counts, offsets, row_starts, rows, out):
    """Write rows of the weight, by number, into out (n, columns), which is zero."""
    for n in range(first, last):
        row = rows[n]
        p = np.int64(row_starts[row])
        for block in range(counts.shape[1]):
            for _ in range(np.int64(counts[row, block])):
                out[n, block * BLOCK + np.int64(offsets[p])] = values[p]
                p += 1


@njit(nogil=True, cache=True, error_model="numpy")
def add_looked_up(first_row, last_row, gradient, counts, offsets, row_starts, rows, skipped, dy):
    """Add gradients of looked up rows, of those from `first_row` to `last_row` (not included)."""
    for n in range(rows.size):
        row = rows[n]
        if row < first_row or row >= last_row or row == skipped:
            continue
        p = np.int64(row_starts[row])
        for block in range(counts.shape[1]):
            for _ in range(np.int64(counts[row, block])):
                gradient[p] += dy[n, block * BLOCK + np.int64(offsets[p])]
                p += 1
