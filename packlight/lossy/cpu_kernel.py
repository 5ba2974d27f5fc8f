"""Values to few bits and back on the CPU: one pass over memory each, group by group.

A group of 256 elements is read once; what follows happens in the innermost cache. Codes are packed
plane by plane: byte j of a group holds the elements j, j + stride, j + 2 stride, .., so that all
loops are over neighbours, which LLVM turns into vector code.

Numba compiles each function at its first use and keeps the result on disk.
"""
# The compiled functions have no annotations that numba would use.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

GROUP = 256
HALF_GROUP = GROUP // 2

f32, i32, u8, u16, u32 = np.float32, np.int32, np.uint8, np.uint16, np.uint32

ZERO = f32(0)
SMALLEST_NORMAL = f32(2.0**-126)  # its reciprocal is finite
LARGEST = f32(np.finfo(np.float32).max)
UNIT, HALF_UNIT = f32(2.0**-16), f32(2.0**-17)  # of random numbers between 0 and 1
NAN = f32(np.nan)


def _reinterpreted(source: Any, target: Any) -> Any:
    @intrinsic
    def bitcast(context: Any, value: Any) -> Any:
        def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], compiler.get_value_type(target))

        return target(source), generate

    return bitcast


_float_of = _reinterpreted(types.uint32, types.float32)
_bits_of = _reinterpreted(types.float32, types.uint32)


@njit(error_model="numpy")
def _mixed(x):
    """Return Wellons' hash lowbias32."""
    x = u32(u32(x ^ (x >> u32(16))) * u32(0x7FEB352D))
    x = u32(u32(x ^ (x >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ (x >> u32(16)))


@njit(error_model="numpy")
def _in_order(bits):
    """Return an integer for a float32's bits: integers are in the floats' order, NaNs outside."""
    signed = i32(bits)
    return i32(signed ^ ((signed >> i32(31)) & i32(0x7FFFFFFF)))


@njit(error_model="numpy")
def _widen(words, shift, values):
    """Write float32 for words that are the upper bits of one; return the least and the largest."""
    least, largest = i32(0x7FFFFFFF), i32(-0x80000000)
    for i in range(words.size):
        bits = u32(u32(words[i]) << shift)
        place = _in_order(bits)
        least, largest = min(least, place), max(largest, place)
        values[i] = _float_of(bits)
    return _float_of(u32(_in_order(u32(least)))), _float_of(u32(_in_order(u32(largest))))


@njit(error_model="numpy")
def _round(values, low, inverse, levels, key, codes):
    """Write each value's code: up or down at random, 16 random bits for each."""
    for i in range(HALF_GROUP):
        word = _mixed(u32(key + u32(i)))
        chance = f32(i32(word & u32(0xFFFF))) * UNIT + HALF_UNIT
        position = f32(f32(values[i] - low) * inverse) + chance
        codes[i] = i32(min(max(position, ZERO), levels))
        chance = f32(i32(word >> u32(16))) * UNIT + HALF_UNIT
        position = f32(f32(values[HALF_GROUP + i] - low) * inverse) + chance
        codes[HALF_GROUP + i] = i32(min(max(position, ZERO), levels))


@njit(error_model="numpy")
def _write_codes(codes, stride, bits, out):
    if bits == 8:
        for j in range(stride):
            out[j] = u8(codes[j])
    elif bits == 4:
        for j in range(stride):
            out[j] = u8(codes[j] | (codes[stride + j] << i32(4)))
    else:
        for j in range(stride):
            lower = codes[j] | (codes[stride + j] << i32(2))
            upper = codes[2 * stride + j] | (codes[3 * stride + j] << i32(2))
            out[j] = u8(lower | (upper << i32(4)))


@njit(nogil=True, cache=True, error_model="numpy")
def pack(words, shift, bits, seed, first_group, lows, steps, packed):
    """Write the codes of float32 words, or of words that are the upper bits of float32.

    `packed` has GROUP * bits / 8 bytes for each group, the last one as many as it takes.
    """
    values = np.empty(GROUP, f32)
    codes = np.empty(GROUP + 8, i32)
    per_byte = 8 // bits
    levels = f32((1 << bits) - 1)
    for group in range(lows.size):
        begin = group * GROUP
        part = words[begin : min(begin + GROUP, words.size)]
        low, high = _widen(part, u32(shift), values)
        extent = f32(high - low)
        step = f32(extent / levels)
        inverse = f32(1) / step if step >= SMALLEST_NORMAL else ZERO
        if not extent <= LARGEST:
            low, step, inverse = NAN, ZERO, ZERO
            values[:] = ZERO  # what is no number has no code
        lows[group], steps[group] = low, step
        key = _mixed(u32(_mixed(u32(_bits_of(low) ^ u32(seed))) + _bits_of(step)))
        key = u32(key + u32(first_group + group) * u32(0x9E3779B9))
        _round(values, low, inverse, levels, key, codes)
        codes[part.size :] = 0
        stride = (part.size + per_byte - 1) // per_byte
        _write_codes(codes, stride, bits, packed[group * (GROUP // per_byte) :])


@njit(error_model="numpy")
def _write(value, narrow, out, i):
    bits = _bits_of(value)
    if narrow:  # to the nearest, ties to even, as torch rounds; NaN stays one
        rounded = u32(bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1)))
        bits = u32(u32(0x7FC0) if value != value else rounded >> u32(16))
    out[i] = bits


@njit(nogil=True, cache=True, error_model="numpy")
def unpack(packed, lows, steps, bits, narrow, words):
    """Write what codes stand for as float32 words, or rounded to their upper 16 bits."""
    per_byte = 8 // bits
    mask = i32((1 << bits) - 1)
    for group in range(lows.size):
        begin = group * GROUP
        part = words[begin : min(begin + GROUP, words.size)]
        stride = (part.size + per_byte - 1) // per_byte
        source = packed[group * (GROUP // per_byte) : group * (GROUP // per_byte) + stride]
        low, step = lows[group], steps[group]
        for plane in range(per_byte):
            shift = i32(plane * bits)
            plane_part = part[plane * stride : min((plane + 1) * stride, part.size)]
            for j in range(plane_part.size):
                code = (i32(source[j]) >> shift) & mask
                _write(f32(low + f32(f32(code) * step)), narrow, plane_part, j)


# -- derivatives in few bits


@njit(error_model="numpy")
def _is_finite(bits):
    return (bits & u32(0x7F800000)) != u32(0x7F800000)


@njit(nogil=True, cache=True, error_model="numpy")
def encode(words, shift, edges, code_of, num_bits, flags, packed):
    """Write for each value the code of the step that it is on; flag groups that are not finite.

    `packed` has GROUP * num_bits / 8 bytes for each group: one plane after the other. Byte j of a
    plane has the bits of the elements j, j + stride, j + 2 stride, ..
    """
    values = np.empty(GROUP, f32)
    codes = np.empty(GROUP + 8, i32)
    for group in range(flags.size):
        begin = group * GROUP
        part = words[begin : min(begin + GROUP, words.size)]
        finite = True
        for i in range(part.size):
            bits = u32(u32(part[i]) << u32(shift))
            finite &= _is_finite(bits)
            values[i] = _float_of(bits)
            codes[i] = 0
        flags[group] = u8(not finite)
        for edge in edges:
            for i in range(part.size):
                codes[i] += i32(values[i] > edge)
        for i in range(part.size):
            codes[i] = code_of[codes[i]]
        stride = (part.size + 7) // 8
        for i in range(part.size, 8 * stride):
            codes[i] = 0
        at = group * (GROUP // 8) * num_bits
        for plane in range(num_bits):
            out = packed[at + plane * stride : at + (plane + 1) * stride]
            for j in range(stride):
                byte = i32(0)
                for k in range(8):
                    bit = (codes[k * stride + j] >> i32(plane)) & i32(1)
                    byte |= bit << i32(k)
                out[j] = u8(byte)


@njit(nogil=True, cache=True, error_model="numpy")
def multiply(packed, flags, levels, num_bits, narrow, shift, gradient, words):
    """Write the gradient times each code's level, as float32 or rounded to its upper 16 bits."""
    codes = np.empty(GROUP + 8, i32)
    for group in range(flags.size):
        begin = group * GROUP
        end = min(begin + GROUP, words.size)
        count = end - begin
        stride = (count + 7) // 8
        codes[:] = 0
        at = group * (GROUP // 8) * num_bits
        for plane in range(num_bits):
            source = packed[at + plane * stride : at + (plane + 1) * stride]
            for k in range(8):
                for j in range(stride):
                    codes[k * stride + j] |= ((i32(source[j]) >> i32(k)) & i32(1)) << i32(plane)
        factor = NAN if flags[group] else f32(1)
        part, above = words[begin:end], gradient[begin:end]
        for i in range(count):
            value = _float_of(u32(u32(above[i]) << u32(shift)))
            _write(f32(value * f32(levels[codes[i]] * factor)), narrow, part, i)
