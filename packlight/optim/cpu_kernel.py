"""One optimizer step on the CPU, tile by tile: decode, update, encode, in one pass over memory.

A tile is 256 elements, so everything about it stays in the innermost cache; nothing larger is ever
decoded. Each stage is a loop over a tile that LLVM turns into vector code: it reads and writes
scratch or what is stored, has no calls and draws no number that its element does not determine.
Which stages run is decided per tile, so there is one compiled function for all rules and formats.
It takes addresses: unpacking ten arrays would cost more than stepping a small parameter.

Numba compiles this file once per machine (about 20 s) and keeps the result on disk, until this very
file changes. So nothing compiled may be imported here, and imported constants are checked.

Random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"),
key (seed, number of the parameter), counter (element, step, which tensor). So an element's random
bits depend on nothing else: not on threads, nor on which parameters were stepped before.
"""
# The compiled functions have no annotations that numba would use.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from packlight.optim.codebooks import SIGNED_4BIT, SIGNED_8BIT, UNSIGNED_8BIT
from packlight.optim.formats import STATE_FORMATS, WEIGHT_FORMATS
from packlight.optim.rules import ADAM, LION, MOMENTUM, NESTEROV

TILE = 256
NUM_SCRATCH_ROWS = 5  # weight, gradient, two moments, random numbers; of TILE items of 4 bytes

f32, i32, u16, u32, u64 = np.float32, np.int32, np.uint16, np.uint32, np.uint64

ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
SMALLEST_NORMAL = f32(2.0**-126)  # its reciprocal is finite

FP32 = STATE_FORMATS["fp32"].code
BF16 = STATE_FORMATS["bf16"].code
BITS8 = STATE_FORMATS["8bit"].code
BITS4 = STATE_FORMATS["4bit"].code
BLOCK4 = STATE_FORMATS["4bit"].block_elements
HALF4 = BLOCK4 // 2
W_FP32 = WEIGHT_FORMATS["fp32"].code
W_STOCHASTIC = WEIGHT_FORMATS["bf16-stochastic"].code
W_FP16 = WEIGHT_FORMATS["fp16-stochastic"].code
W_KAHAN = WEIGHT_FORMATS["bf16-kahan"].code
W_ERROR8 = WEIGHT_FORMATS["bf16+8bit"].code

# Frozen into the compiled code.
SLOPES_S, OFFSETS_S, HEIGHTS_S, SHIFTS_S = (tuple(map(f32, t)) for t in SIGNED_8BIT.lines)
SLOPES_U, OFFSETS_U, HEIGHTS_U, SHIFTS_U = (tuple(map(f32, t)) for t in UNSIGNED_8BIT.lines)
_, _, HEIGHTS_4, SHIFTS_4 = (tuple(map(f32, t)) for t in SIGNED_4BIT.lines)
MIDPOINTS_4 = tuple(f32((a + b) / 2) for a, b in pairwise(SIGNED_4BIT.magnitudes))
# The code of zero, which is also how many negative levels there are.
ZERO_8 = i32(SIGNED_8BIT.num_negative)
ZERO_4 = i32(SIGNED_4BIT.num_negative)

CONSTANTS_CRC = 1300656830
assert CONSTANTS_CRC == crc32(
    repr((
        SIGNED_8BIT, SIGNED_8BIT.lines, UNSIGNED_8BIT, UNSIGNED_8BIT.lines, SIGNED_4BIT,
        SIGNED_4BIT.lines, STATE_FORMATS, WEIGHT_FORMATS, MOMENTUM, NESTEROV, ADAM, LION,
    )).encode()
), "write the new number above: that makes numba compile with the constants as they are now"

# -- words


def _cast(source: Any, target: Any, how: str) -> Any:
    """Return a compiled function that is one LLVM instruction."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, how)(arguments[0], compiler.get_value_type(target))

        return target(source), generate

    return cast


_bits = _cast(types.float32, types.uint32, "bitcast")
_from_bits = _cast(types.uint32, types.float32, "bitcast")
_pointer = _cast(types.int64, types.voidptr, "inttoptr")


@intrinsic
def _half(context: Any, value: Any) -> Any:
    """Round to float16, returned as its bits."""

    def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _from_half(context: Any, value: Any) -> Any:
    """Return a float16, given as its bits, as float32."""

    def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@njit(error_model="numpy")
def _from_brain(word):
    return _from_bits(u32(u32(word) << u32(16)))


@njit(error_model="numpy")
def _brain_plus(x, addend):
    """Add to the bits that bfloat16 does not have, then cut them off; NaN stays NaN."""
    word = u32(u32(_bits(x) + addend) >> u32(16))
    return u16(word) if x == x else u16(0x7FC0)


@njit(error_model="numpy")
def _brain(x):
    """Round to nearest even."""
    is_odd = u32(u32(_bits(x) >> u32(16)) & u32(1))
    return _brain_plus(x, u32(u32(0x7FFF) + is_odd))


# -- random numbers


@njit(error_model="numpy")
def _draw(tile, step, tensor, seed, number, out):
    """Fill a tile with 16 random bits for each element."""
    for lane in range(32):
        counter = u64(u64(tile) * u64(32) + u64(lane))
        a, b = u32(counter & u64(0xFFFFFFFF)), u32(counter >> u64(32))
        c, d = u32(step), u32(tensor)
        k, j = u32(seed), u32(number)
        for _ in range(10):
            p = u64(a) * u64(0xD2511F53)
            q = u64(c) * u64(0xCD9E8D57)
            a, b = u32(u32(q >> u64(32)) ^ u32(b ^ k)), u32(q & u64(0xFFFFFFFF))
            c, d = u32(u32(p >> u64(32)) ^ u32(d ^ j)), u32(p & u64(0xFFFFFFFF))
            k, j = u32(k + u32(0x9E3779B9)), u32(j + u32(0xBB67AE85))
        out[lane], out[32 + lane] = a & u32(0xFFFF), a >> u32(16)
        out[64 + lane], out[96 + lane] = b & u32(0xFFFF), b >> u32(16)
        out[128 + lane], out[160 + lane] = c & u32(0xFFFF), c >> u32(16)
        out[192 + lane], out[224 + lane] = d & u32(0xFFFF), d >> u32(16)


# -- moments


@njit(error_model="numpy")
def _largest(x):
    """Return the largest magnitude; NaN if there is one, whose bits are above infinity's."""
    found = u32(0)
    for i in range(x.size):
        found = max(found, _bits(abs(x[i])))
    return _from_bits(found)


# Encoding with a dynamic map is a concave function made of one line for each decade, so it is the
# lowest of the lines; decoding is convex and the highest. That needs no search and no table.


@njit(error_model="numpy", fastmath={"contract"})
def _cell(magnitude, slopes, offsets):
    """Return the code of a magnitude of at most 1."""
    lowest = magnitude * slopes[0] + offsets[0]
    for d in range(1, len(slopes)):
        lowest = min(lowest, magnitude * slopes[d] + offsets[d])
    return i32(lowest)


@njit(error_model="numpy", fastmath={"contract"})
def _level(code, heights, shifts):
    """Return the magnitude of a code that is not negative."""
    middle = f32(code) + HALF
    level = ZERO
    for d in range(len(heights)):
        level = max(level, middle * heights[d] + shifts[d])
    return min(level, ONE)


@njit(error_model="numpy")
def _signed_level(code, heights, shifts):
    level = _level(abs(code), heights, shifts)
    return level if code >= 0 else -level


@njit(error_model="numpy")
def _decode8_signed(codes, scale, out):
    for i in range(codes.size):
        out[i] = _signed_level(i32(codes[i]) - ZERO_8, HEIGHTS_S, SHIFTS_S) * scale


@njit(error_model="numpy")
def _decode8_unsigned(codes, scale, out):
    for i in range(codes.size):
        out[i] = _level(codes[i], HEIGHTS_U, SHIFTS_U) * scale


@njit(error_model="numpy")
def _encode8_signed(x, codes):
    scale = _largest(x)
    inverse = ONE / max(scale, SMALLEST_NORMAL)
    for i in range(codes.size):
        code = _cell(abs(x[i] * inverse), SLOPES_S, OFFSETS_S)
        codes[i] = np.uint8(ZERO_8 - min(code, ZERO_8) if x[i] < ZERO else ZERO_8 + code)
    return scale


@njit(error_model="numpy")
def _encode8_unsigned(x, codes):
    scale = _largest(x)
    inverse = ONE / max(scale, SMALLEST_NORMAL)
    for i in range(codes.size):
        code = _cell(x[i] * inverse, SLOPES_U, OFFSETS_U)
        codes[i] = np.uint8(max(code, i32(1)) if x[i] > ZERO else code)
    return scale


@njit(error_model="numpy")
def _decode4_signed(codes, scale, out):
    for i in range(HALF4):  # a block's first half in the low bits, its second in the high ones
        low, high = i32(codes[i] & 15) - ZERO_4, i32(codes[i] >> 4) - ZERO_4
        out[i] = _signed_level(low, HEIGHTS_4, SHIFTS_4) * scale
        out[HALF4 + i] = _signed_level(high, HEIGHTS_4, SHIFTS_4) * scale


@njit(error_model="numpy")
def _decode4_unsigned(codes, scale, out):
    step = scale * f32(1 / 16)
    for i in range(HALF4):
        out[i] = f32(i32(codes[i] & 15) + i32(1)) * step
        out[HALF4 + i] = f32(i32(codes[i] >> 4) + i32(1)) * step


@njit(error_model="numpy")
def _nearest4(y):
    code = i32(0)
    for midpoint in MIDPOINTS_4:
        if abs(y) > midpoint:
            code += i32(1)
    return ZERO_4 - min(code, ZERO_4) if y < ZERO else ZERO_4 + code


@njit(error_model="numpy")
def _linear4(y):
    return min(max(i32(y * f32(16) - f32(0.5)), i32(0)), i32(15))


@njit(error_model="numpy")
def _encode4_signed(x, codes):
    scale = _largest(x)
    inverse = ONE / max(scale, SMALLEST_NORMAL)
    for i in range(HALF4):
        low, high = _nearest4(x[i] * inverse), _nearest4(x[HALF4 + i] * inverse)
        codes[i] = np.uint8(low | (high << i32(4)))
    return scale


@njit(error_model="numpy")
def _encode4_unsigned(x, codes):
    scale = _largest(x)
    inverse = ONE / max(scale, SMALLEST_NORMAL)
    for i in range(HALF4):
        low, high = _linear4(x[i] * inverse), _linear4(x[HALF4 + i] * inverse)
        codes[i] = np.uint8(low | (high << i32(4)))
    return scale


@njit(error_model="numpy")
def _load_moment(form, is_signed, address, scale_address, tile, count, out):
    """Decode a tile of a moment; what is behind its last element becomes 0 or is unread."""
    begin = tile * TILE
    end = begin + count
    if form == BF16:
        stored = carray(_pointer(address), end, u16)[begin:]
        for i in range(count):
            out[i] = _from_brain(stored[i])
    elif form == BITS8:
        codes = carray(_pointer(address), end, np.uint8)[begin:]
        scale = carray(_pointer(scale_address), tile + 1, f32)[tile]
        if is_signed:
            _decode8_signed(codes, scale, out)
        else:
            _decode8_unsigned(codes, scale, out)
    else:
        for block in range((count + BLOCK4 - 1) // BLOCK4):
            index = tile * (TILE // BLOCK4) + block
            codes = carray(_pointer(address), (index + 1) * HALF4, np.uint8)[index * HALF4 :]
            scale = carray(_pointer(scale_address), index + 1, f32)[index]
            if is_signed:
                _decode4_signed(codes, scale, out[block * BLOCK4 :])
            else:
                _decode4_unsigned(codes, scale, out[block * BLOCK4 :])


@njit(error_model="numpy")
def _store_moment(form, is_signed, address, scale_address, tile, count, x, random):
    begin = tile * TILE
    end = begin + count
    if form == BF16:
        stored = carray(_pointer(address), end, u16)[begin:]
        for i in range(count):
            stored[i] = _brain_plus(x[i], random[i])
    elif form == BITS8:
        codes = carray(_pointer(address), end, np.uint8)[begin:]
        scales = carray(_pointer(scale_address), tile + 1, f32)
        if is_signed:
            scales[tile] = _encode8_signed(x[:count], codes)
        else:
            scales[tile] = _encode8_unsigned(x[:count], codes)
    else:
        for i in range(count, x.size):
            x[i] = ZERO
        for block in range((count + BLOCK4 - 1) // BLOCK4):
            index = tile * (TILE // BLOCK4) + block
            codes = carray(_pointer(address), (index + 1) * HALF4, np.uint8)[index * HALF4 :]
            scales = carray(_pointer(scale_address), index + 1, f32)
            part = x[block * BLOCK4 : (block + 1) * BLOCK4]
            if is_signed:
                scales[index] = _encode4_signed(part, codes)
            else:
                scales[index] = _encode4_unsigned(part, codes)


# -- weights


@njit(error_model="numpy")
def _load(form, address, begin, count, out):
    """Decode a tile of weights or gradients, residuals not included."""
    end = begin + count
    if form == W_FP16:
        halves = carray(_pointer(address), end, u16)[begin:]
        for i in range(count):
            out[i] = _from_half(halves[i])
    else:
        brains = carray(_pointer(address), end, u16)[begin:]
        for i in range(count):
            out[i] = _from_brain(brains[i])


@njit(error_model="numpy")
def _last_place(x, smallest, digits):
    """Return the value of the last of so many binary digits of a float, as float32."""
    exponent = max(u32(u32(_bits(x) >> u32(23)) & u32(255)), u32(smallest))
    return _from_bits(u32(u32(exponent - u32(digits)) << u32(23)))


@njit(error_model="numpy")
def _add_residual(form, address, begin, count, w):
    """Add what the last rounding has cut off."""
    end = begin + count
    if form == W_KAHAN:
        brains = carray(_pointer(address), end, u16)[begin:]
        for i in range(count):
            w[i] += _from_brain(brains[i])
    elif form == W_ERROR8:
        errors = carray(_pointer(address), end, np.int8)[begin:]
        for i in range(count):
            w[i] += f32(errors[i]) * (_last_place(w[i], 8, 7) * f32(1 / 254))


@njit(error_model="numpy")
def _store(form, address, residual_address, begin, count, w, random):
    end = begin + count
    words = carray(_pointer(address), end, u16)[begin:]
    if form == W_STOCHASTIC:
        for i in range(count):
            words[i] = _brain_plus(w[i], random[i])
    elif form == W_FP16:
        for i in range(count):
            unit = _last_place(w[i], 113, 10)  # subnormals have the exponent of 2^-14
            steps = w[i] / unit
            lower = np.floor(steps)
            if (steps - lower) * f32(65536) > f32(random[i]):
                lower += ONE
            words[i] = _half(lower * unit)
    else:
        for i in range(count):
            words[i] = _brain(w[i])
    if form == W_KAHAN:
        brains = carray(_pointer(residual_address), end, u16)[begin:]
        for i in range(count):
            brains[i] = _brain(w[i] - _from_brain(words[i]))
    elif form == W_ERROR8:
        errors = carray(_pointer(residual_address), end, np.int8)[begin:]
        for i in range(count):
            kept = _from_brain(words[i])
            error = (w[i] - kept) / _last_place(kept, 8, 7) * f32(254)
            errors[i] = np.int8(i32(np.rint(error)))


# -- rules


@njit(error_model="numpy")
def _decay(w, gradient, g, sign, decay, l2):
    for i in range(w.size):
        g[i] = sign * gradient[i] + l2 * w[i]
        w[i] *= decay


@njit(error_model="numpy")
def _plain_sgd(w, g, rate):
    for i in range(w.size):
        w[i] -= rate * g[i]


@njit(error_model="numpy")
def _momentum(w, g, m, rate, beta, is_nesterov):
    for i in range(w.size):
        moment = beta * m[i] + g[i]
        m[i] = moment
        w[i] -= rate * (g[i] + beta * moment if is_nesterov else moment)


@njit(error_model="numpy")
def _adam(w, g, m, v, rate, beta1_rest, beta2, beta2_rest, eps, root_correction):
    for i in range(w.size):
        first = m[i] + beta1_rest * (g[i] - m[i])
        second = beta2 * v[i] + beta2_rest * g[i] * g[i]
        m[i], v[i] = first, second
        w[i] -= rate * (first / (np.sqrt(second) * root_correction + eps))


@njit(error_model="numpy")
def _lion(w, g, m, rate, beta1, beta1_rest, beta2, beta2_rest):
    for i in range(w.size):
        mixed = beta1 * m[i] + beta1_rest * g[i]
        w[i] -= rate * (f32(mixed > ZERO) - f32(mixed < ZERO))
        m[i] = beta2 * m[i] + beta2_rest * g[i]


@njit(nogil=True, cache=True, error_model="numpy")
def step_tiles(
    first_tile, last_tile, num_elements, rule, sign,
    weight_form, weight, residual, gradient_form, gradient,
    first_form, first, first_scale, second_form, second, second_scale,
    decay, l2, rate, beta1, beta1_rest, beta2, beta2_rest, eps, root_correction,
    seed, number, step, scratch,
):  # fmt: skip
    """Step tiles of one parameter.

    `first_tile` to `last_tile` (not included) are stepped; `sign` is -1 to maximize. Forms are
    codes of formats, -1 of a moment that the rule does not keep. Tensors are addresses, 0 of what
    there is not. `decay` to `root_correction` are `rules.Coefficients`. `seed`, `number` and `step`
    are what random bits depend on beside the element. `scratch` is the address of
    NUM_SCRATCH_ROWS * TILE * 4 bytes that nobody else uses meanwhile.
    """
    rows = carray(_pointer(scratch), (NUM_SCRATCH_ROWS, TILE), f32)
    random = carray(_pointer(scratch + (NUM_SCRATCH_ROWS - 1) * TILE * 4), TILE, u32)
    for tile in range(first_tile, last_tile):
        begin = tile * TILE
        end = min(begin + TILE, num_elements)
        count = end - begin
        w, raw, g, m, v = rows[0][:count], rows[1][:count], rows[1][:count], rows[2], rows[3]
        # What is stored in fp32 is used and updated where it lies.
        if weight_form == W_FP32:
            w = carray(_pointer(weight), end, f32)[begin:]
        else:
            _load(weight_form, weight, begin, count, w)
            _add_residual(weight_form, residual, begin, count, w)
        if gradient_form == W_FP32:
            raw = carray(_pointer(gradient), end, f32)[begin:]
        else:
            _load(gradient_form, gradient, begin, count, raw)
        if first_form == FP32:
            m = carray(_pointer(first), end, f32)[begin:]
        elif first_form > FP32:
            _load_moment(first_form, True, first, first_scale, tile, count, m)
        if second_form == FP32:
            v = carray(_pointer(second), end, f32)[begin:]
        elif second_form > FP32:
            _load_moment(second_form, False, second, second_scale, tile, count, v)
        _decay(w, raw, g, f32(sign), f32(decay), f32(l2))
        if rule == ADAM:
            _adam(
                w, g, m, v, f32(rate), f32(beta1_rest), f32(beta2), f32(beta2_rest), f32(eps),
                f32(root_correction),
            )
        elif rule == LION:
            _lion(w, g, m, f32(rate), f32(beta1), f32(beta1_rest), f32(beta2), f32(beta2_rest))
        elif rule == MOMENTUM or rule == NESTEROV:
            _momentum(w, g, m, f32(rate), f32(beta1), rule == NESTEROV)
        else:
            _plain_sgd(w, g, f32(rate))
        if first_form > FP32:
            if first_form == BF16:
                _draw(tile, step, 1, seed, number, random)
            _store_moment(first_form, True, first, first_scale, tile, count, m, random)
        if second_form > FP32:
            if second_form == BF16:
                _draw(tile, step, 2, seed, number, random)
            _store_moment(second_form, False, second, second_scale, tile, count, v, random)
        if weight_form == W_STOCHASTIC or weight_form == W_FP16:
            _draw(tile, step, 0, seed, number, random)
        if weight_form != W_FP32:
            _store(weight_form, weight, residual, begin, count, w, random)
