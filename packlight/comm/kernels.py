"""Codecs on the CPU: quantize and pack, pick the largest, write gaps, sketch; in one pass.

Quantizers work on tiles of 256 elements in the innermost cache: scale, round, pack. Codes are
packed plane by plane: the byte j of a tile holds the elements j, j + stride, j + 2 stride, .., so
that packing is a loop over bytes which LLVM turns into vector code. The largest elements are found
without sorting: blocks in which nothing reaches the threshold are skipped, 32 elements at a time.

Random bits are a hash of (two keys, element): they depend on nothing else, so that a step that is
run again rounds again in the same way. The hash is Wellons' lowbias32, applied twice.

Numba compiles each function at its first use and keeps the result on disk.
"""
# The compiled functions have no annotations that numba would use.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

TILE = 256
GROUP = 32  # elements that are looked at together where few of them matter

f32, i32, u8, u32, u64 = np.float32, np.int32, np.uint8, np.uint32, np.uint64

# How a block's scale is made.
LARGEST, EUCLIDEAN, MEAN_MAGNITUDE = range(3)

ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
SMALLEST_NORMAL = f32(2.0**-126)  # its reciprocal is finite
UNIT = f32(2.0**-24)  # of random numbers in [0, 1)
MAGNITUDE = u32(0x7FFFFFFF)


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """Return a float32's bits."""

    def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], compiler.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@njit(error_model="numpy")
def _mixed(x):
    x = u32(u32(x ^ (x >> u32(16))) * u32(0x7FEB352D))
    x = u32(u32(x ^ (x >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ (x >> u32(16)))


@njit(error_model="numpy")
def _random(element, key, other_key):
    """Return 32 random bits."""
    return _mixed(u32(_mixed(u32(u32(element) + key)) ^ other_key))


# -- quantization in blocks


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _sum_of_magnitudes(x):
    total = ZERO
    for i in range(x.size):
        total += abs(x[i])
    return total


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _sum_of_squares(x):
    total = ZERO
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@njit(error_model="numpy")
def _largest_bits(x):
    """Return the bits of the largest magnitude; NaN's are above infinity's."""
    found = u32(0)
    for i in range(x.size):
        found = max(found, u32(_bits(x[i]) & MAGNITUDE))
    return found


@njit(error_model="numpy")
def _scale(x, norm):
    if norm == MEAN_MAGNITUDE:
        return f32(_sum_of_magnitudes(x) / f32(x.size))
    if norm == EUCLIDEAN:
        return f32(np.sqrt(_sum_of_squares(x)))
    largest = np.empty(1, u32)
    largest[0] = _largest_bits(x)
    return largest.view(f32)[0]


@njit(error_model="numpy")
def _codes_to_nearest(x, factor, levels, codes):
    top = f32(2 * levels)
    for i in range(x.size):
        codes[i] = i32(min(max(x[i] * factor + f32(levels) + HALF, ZERO), top))


@njit(error_model="numpy")
def _codes_at_random(x, factor, levels, codes, first, key, other_key):
    top = f32(2 * levels)
    for i in range(x.size):
        chance = f32(i32(_random(first + i, key, other_key) >> u32(8))) * UNIT
        codes[i] = i32(min(max(x[i] * factor + f32(levels) + chance, ZERO), top))


@njit(error_model="numpy")
def _signs(x, codes):
    for i in range(x.size):
        codes[i] = i32(x[i] >= ZERO)


@njit(error_model="numpy")
def _pack(codes, count, per_byte, base, out):
    """Write a tile's codes, plane by plane; what is behind the last element counts as 0."""
    stride = (count + per_byte - 1) // per_byte
    for i in range(count, per_byte * stride):
        codes[i] = 0
    for j in range(stride):
        out[j] = u8(codes[j])
    weight = i32(base)
    for plane in range(1, per_byte):
        above = codes[plane * stride : (plane + 1) * stride]
        for j in range(stride):
            out[j] = u8(i32(out[j]) + weight * above[j])
        weight *= i32(base)
    return stride


@njit(error_model="numpy")
def _unpack(packed, count, per_byte, base, codes):
    stride = (count + per_byte - 1) // per_byte
    if base == 3:
        for j in range(stride):
            digits = i32(packed[j])
            for plane in range(per_byte):
                rest = (digits * i32(171)) >> i32(9)  # a third, exact below 512
                codes[plane * stride + j] = digits - i32(3) * rest
                digits = rest
        return stride
    mask = i32(base - 1)
    for plane in range(per_byte):
        above = codes[plane * stride : (plane + 1) * stride]
        shift = i32(plane * (8 // per_byte))
        for j in range(stride):
            above[j] = (i32(packed[j]) >> shift) & mask
    return stride


@njit(nogil=True, cache=True, error_model="numpy")
def quantize(x, block, norm, levels, is_random, key, other_key, per_byte, base, scales, packed):
    """Write codes from 0 to 2 levels (0 and 1 if levels is 0), packed, and a scale per block.

    `block` is a multiple of 256, or not less than the number of elements. `packed` has as many
    bytes as `packed_bytes` says. Returns how many were written.
    """
    codes = np.empty(TILE + 8, i32)
    at = 0
    for begin in range(0, x.size, block):
        end = min(begin + block, x.size)
        scale = _scale(x[begin:end], norm)
        scales[begin // block] = scale
        factor = f32(levels) / max(scale, SMALLEST_NORMAL)
        for first in range(begin, end, TILE):
            part = x[first : min(first + TILE, end)]
            if levels == 0:
                _signs(part, codes)
            elif is_random:
                _codes_at_random(part, factor, levels, codes, first, u32(key), u32(other_key))
            else:
                _codes_to_nearest(part, factor, levels, codes)
            at += _pack(codes, part.size, per_byte, base, packed[at:])
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def add_dequantized(packed, scales, block, levels, per_byte, base, out):
    """Add what codes and scales stand for to `out`."""
    codes = np.empty(TILE + 8, i32)
    at = 0
    for begin in range(0, out.size, block):
        end = min(begin + block, out.size)
        scale = scales[begin // block]
        step = scale / f32(levels) if levels > 0 else scale * f32(2)
        lowest = f32(levels) if levels > 0 else HALF
        for first in range(begin, end, TILE):
            part = out[first : min(first + TILE, end)]
            at += _unpack(packed[at:], part.size, per_byte, base, codes)
            for i in range(part.size):
                part[i] += (f32(codes[i]) - lowest) * step


def packed_bytes(num_elements: int, block: int, per_byte: int) -> int:
    """Return how many bytes the codes of so many elements take."""
    full, rest = divmod(num_elements, block)
    in_block = -(-TILE // per_byte) * (block // TILE) + -(-(block % TILE) // per_byte)
    return full * in_block + (rest // TILE) * -(-TILE // per_byte) + -(-(rest % TILE) // per_byte)


# -- the largest elements


@njit(nogil=True, cache=True, error_model="numpy")
def reaching(x, threshold, out):
    """Write the indices, in order, of magnitudes of at least `threshold`; NaN reaches any.

    Returns how many there are; those that do not fit into `out` are only counted.
    """
    least = _bits(threshold)
    found = 0
    for begin in range(0, x.size, GROUP):
        part = x[begin : min(begin + GROUP, x.size)]
        if _largest_bits(part) < least:
            continue
        for i in range(part.size):
            if u32(_bits(part[i]) & MAGNITUDE) >= least:
                if found < out.size:
                    out[found] = begin + i
                found += 1
    return found


# -- gaps between indices, Rice's code: the high part in unary, the low bits as they are


@njit(nogil=True, cache=True, error_model="numpy")
def write_gaps(indices, num_low, out):
    """Write ascending indices; returns how many bits that took. `out` is zero before."""
    at = u64(0)
    previous = -1
    for index in indices:
        gap = u64(index - previous - 1)
        previous = index
        at += u64(gap >> u64(num_low))  # so many zeros, then a one
        out[at >> u64(3)] |= u8(u64(1) << (at & u64(7)))
        at += u64(1)
        for bit in range(num_low):
            out[at >> u64(3)] |= u8(((gap >> u64(bit)) & u64(1)) << (at & u64(7)))
            at += u64(1)
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def read_gaps(packed, num_low, limit, indices):
    """Read as many indices as there is room for, all below `limit`.

    Returns how many bits were read; -1 if that is no list of such indices.
    """
    at = u64(0)
    num_bits = u64(packed.size) * u64(8)
    index = np.int64(-1)
    for i in range(indices.size):
        high = u64(0)
        while at < num_bits and not (packed[at >> u64(3)] >> (at & u64(7))) & 1:
            at += u64(1)
            high += u64(1)
        at += u64(1)
        if at + u64(num_low) > num_bits:
            return -1
        low = u64(0)
        for bit in range(num_low):
            low |= u64((packed[at >> u64(3)] >> (at & u64(7))) & 1) << u64(bit)
            at += u64(1)
        index += np.int64((high << u64(num_low)) | low) + 1
        if index >= limit:
            return -1
        indices[i] = index
    return np.int64(at)


# -- count-sketches


@njit(error_model="numpy")
def _cell(word, cells):
    return np.int64((u64(word >> u32(1)) * u64(cells)) >> u64(31))


@njit(error_model="numpy")
def _sign(word):
    """Return 1 or -1, without a branch: half of them would be guessed wrong."""
    return f32(i32(word & u32(1)) * i32(2) - i32(1))


@njit(nogil=True, cache=True, error_model="numpy")
def add_to_sketch(x, key, sketch):
    """Add each element, with a random sign, to one random cell of each row."""
    rows, cells = sketch.shape
    for row in range(rows):
        line = sketch[row]
        for i in range(x.size):
            word = _random(i, u32(key), u32(row))
            line[_cell(word, cells)] += _sign(word) * x[i]


@njit(nogil=True, cache=True, error_model="numpy")
def estimate_from_sketch(sketch, key, out):
    """Write the median over the rows of what each element's cells say."""
    rows, cells = sketch.shape
    said = np.empty(rows, f32)
    for i in range(out.size):
        for row in range(rows):
            word = _random(i, u32(key), u32(row))
            value = sketch[row, _cell(word, cells)] * _sign(word)
            place = row
            while place > 0 and said[place - 1] > value:
                said[place] = said[place - 1]
                place -= 1
            said[place] = value
        out[i] = (said[(rows - 1) // 2] + said[rows // 2]) * HALF
