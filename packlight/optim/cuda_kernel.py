"""One optimizer step on CUDA: the pass of `cpu_kernel`, one Triton program for each tile.

NOT YET RUN ON A GPU. It compiles for one (sm_90), and what it computes was compared with the CPU's
kernel in Triton's interpreter; tests/test_optim_cuda.py does so on a GPU where there is one.

Random bits are the CPU's, to the bit; sums may be contracted elsewhere, so that last places of
weights and moments can differ. Each element computes the whole Philox call of which it uses an
eighth, which keeps the kernel short and costs no memory traffic.
"""
# Compiled by Triton, whose functions have no types that mypy would know.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.random import philox

from packlight.optim.codebooks import SIGNED_4BIT, SIGNED_8BIT, UNSIGNED_8BIT, DynamicMap
from packlight.optim.formats import STATE_FORMATS, WEIGHT_FORMATS
from packlight.optim.rules import ADAM as ADAM_RULE
from packlight.optim.rules import LION as LION_RULE
from packlight.optim.rules import NESTEROV as NESTEROV_RULE
from packlight.optim.rules import PLAIN_SGD as PLAIN_RULE

if TYPE_CHECKING:
    from packlight.optim.backend import Update

TILE = tl.constexpr(256)
ADAM, LION = tl.constexpr(ADAM_RULE), tl.constexpr(LION_RULE)
NESTEROV, PLAIN_SGD = tl.constexpr(NESTEROV_RULE), tl.constexpr(PLAIN_RULE)
FP32, BF16 = tl.constexpr(STATE_FORMATS["fp32"].code), tl.constexpr(STATE_FORMATS["bf16"].code)
BITS8, BITS4 = tl.constexpr(STATE_FORMATS["8bit"].code), tl.constexpr(STATE_FORMATS["4bit"].code)
W_FP32 = tl.constexpr(WEIGHT_FORMATS["fp32"].code)
W_STOCHASTIC = tl.constexpr(WEIGHT_FORMATS["bf16-stochastic"].code)
W_FP16 = tl.constexpr(WEIGHT_FORMATS["fp16-stochastic"].code)
W_KAHAN = tl.constexpr(WEIGHT_FORMATS["bf16-kahan"].code)
W_ERROR8 = tl.constexpr(WEIGHT_FORMATS["bf16+8bit"].code)
DECADES_8 = tl.constexpr(len(SIGNED_8BIT.edges))
DECADES_4 = tl.constexpr(len(SIGNED_4BIT.edges))
ZERO_8, ZERO_4 = tl.constexpr(SIGNED_8BIT.num_negative), tl.constexpr(SIGNED_4BIT.num_negative)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _draw(at, step, tensor: tl.constexpr, key):
    """Return 16 random bits for each element; see `cpu_kernel`."""
    lane, part = at % 32, (at % TILE) // 32
    counter = (at // TILE).to(tl.uint64) * 32 + lane.to(tl.uint64)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = philox(key, low, high, (low * 0 + step).to(tl.uint32), low * 0 + tensor)
    word = tl.where(part < 4, tl.where(part < 2, a, b), tl.where(part < 6, c, d))
    return (word >> (16 * (part % 2)).to(tl.uint32)) & 0xFFFF


@triton.jit
def _brain_plus(x, addend):
    word = (x.to(tl.uint32, bitcast=True) + addend.to(tl.uint32)) >> 16
    return tl.where(x == x, word, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _brain(x):
    return _brain_plus(x, ((x.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF)


@triton.jit
def _last_place(x, smallest: tl.constexpr, digits: tl.constexpr):
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, smallest)
    return ((exponent - digits) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _level(code, lines, NUM: tl.constexpr):
    """Return magnitudes: the highest of the lines of `DynamicMap.lines`."""
    level = code.to(tl.float32) * 0
    for d in tl.static_range(NUM):
        height, shift = tl.load(lines + 2 * NUM + d), tl.load(lines + 3 * NUM + d)
        level = tl.maximum(level, (code.to(tl.float32) + 0.5) * height + shift)
    return tl.minimum(level, 1.0)


@triton.jit
def _cell(magnitude, lines, NUM: tl.constexpr):
    lowest = magnitude * tl.load(lines) + tl.load(lines + NUM)
    for d in tl.static_range(1, NUM):
        line = magnitude * tl.load(lines + d) + tl.load(lines + NUM + d)
        lowest = tl.minimum(lowest, line)
    return lowest.to(tl.int32)


@triton.jit
def _load_moment(FORM: tl.constexpr, IS_SIGNED: tl.constexpr, values, scales, lines, at, inside):
    if FORM == BITS8:
        scale = tl.load(scales + at // TILE, mask=inside, other=0.0)
        code = tl.load(values + at, mask=inside, other=0).to(tl.int32)
        if IS_SIGNED:
            code -= ZERO_8
            level = _level(tl.abs(code), lines, DECADES_8)
            return tl.where(code >= 0, level, -level) * scale
        else:
            return _level(code, lines, DECADES_8) * scale
    elif FORM == BITS4:
        scale = tl.load(scales + at // 128, mask=inside, other=0.0)
        byte = tl.load(values + at // 128 * 64 + at % 64, mask=inside, other=0).to(tl.int32)
        code = (byte >> (at % 128 // 64 * 4).to(tl.int32)) & 15
        if IS_SIGNED:
            code -= ZERO_4
            level = _level(tl.abs(code), lines, DECADES_4)
            return tl.where(code >= 0, level, -level) * scale
        else:
            return (code + 1).to(tl.float32) * (scale * 0.0625)
    else:
        return tl.load(values + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _largest(x, NUM_BLOCKS: tl.constexpr):
    """Return each block's largest magnitude, NaN if it has one, and its reciprocal."""
    words = tl.reshape(tl.abs(x).to(tl.int32, bitcast=True), (NUM_BLOCKS, TILE // NUM_BLOCKS))
    scale = tl.max(words, axis=1).to(tl.float32, bitcast=True)
    inverse = 1.0 / tl.where(scale < SMALLEST_NORMAL, SMALLEST_NORMAL, scale)
    spread = tl.broadcast_to(inverse[:, None], (NUM_BLOCKS, TILE // NUM_BLOCKS))
    return scale, tl.reshape(spread, (TILE,))


@triton.jit
def _store_moment(
    FORM: tl.constexpr, IS_SIGNED: tl.constexpr, values, scales, lines, at, inside, x, tile, random
):
    if FORM == BITS8:
        scale, inverse = _largest(x, 1)
        tl.store(scales + tile + tl.arange(0, 1), scale)
        if IS_SIGNED:
            code = _cell(tl.abs(x) * inverse, lines, DECADES_8)
            code = tl.where(x < 0, ZERO_8 - tl.minimum(code, ZERO_8), ZERO_8 + code)
        else:
            code = _cell(x * inverse, lines, DECADES_8)
            code = tl.where(x > 0, tl.maximum(code, 1), code)
        tl.store(values + at, code.to(tl.uint8), mask=inside)
    elif FORM == BITS4:
        scale, inverse = _largest(x, 2)
        y = x * inverse
        if IS_SIGNED:
            code = (y * 0).to(tl.int32)
            for i in tl.static_range(8):  # midpoints follow the lines
                code += (tl.abs(y) > tl.load(lines + 4 * DECADES_4 + i)).to(tl.int32)
            code = tl.where(y < 0, ZERO_4 - tl.minimum(code, ZERO_4), ZERO_4 + code)
        else:
            code = tl.minimum(tl.maximum((y * 16 - 0.5).to(tl.int32), 0), 15)
        halves = tl.reshape(code & 15, (2, 2, 64))
        packed = tl.sum(halves << (4 * tl.arange(0, 2))[None, :, None], axis=1)
        block = tile * 2 + tl.arange(0, 2)
        begins = tl.min(tl.reshape(at, (2, 128)), axis=1)
        is_there = tl.max(tl.reshape(inside.to(tl.int32), (2, 128)), axis=1) > 0
        tl.store(scales + block, scale, mask=is_there)
        places = begins[:, None] // 2 + tl.arange(0, 64)[None, :]
        tl.store(values + places, packed.to(tl.uint8), mask=is_there[:, None])
    elif FORM == BF16:
        tl.store(values + at, _brain_plus(x, random), mask=inside)
    else:
        tl.store(values + at, x, mask=inside)


@triton.jit(do_not_specialize=["key", "step"])
def _step_tile(
    weight, residual, gradient, first, first_scale, second, second_scale,
    first_lines, second_lines, num_elements,
    sign, decay, l2, rate, beta1, beta1_rest, beta2, beta2_rest, eps, root_correction,
    key, step,
    RULE: tl.constexpr, WEIGHT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < num_elements
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT == W_KAHAN:
        w += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    elif WEIGHT == W_ERROR8:
        error = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        w += error * (_last_place(w, 8, 7) * (1 / 254))
    g = sign * tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) + l2 * w
    w *= decay
    if RULE == PLAIN_SGD:
        w -= rate * g
    else:
        m = _load_moment(FIRST, True, first, first_scale, first_lines, at, inside)
        if RULE == ADAM:
            v = _load_moment(SECOND, False, second, second_scale, second_lines, at, inside)
            m += beta1_rest * (g - m)
            v = beta2 * v + beta2_rest * g * g
            w -= rate * (m / (tl.sqrt(v) * root_correction + eps))
            bits = _draw(at, step, 2, key) if SECOND == BF16 else at
            v = tl.where(inside, v, 0.0)
            _store_moment(
                SECOND, False, second, second_scale, second_lines, at, inside, v, tile, bits
            )
        elif RULE == LION:
            mixed = beta1 * m + beta1_rest * g
            w -= rate * ((mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32))
            m = beta2 * m + beta2_rest * g
        else:
            m = beta1 * m + g
            w -= rate * (g + beta1 * m if RULE == NESTEROV else m)
        bits = _draw(at, step, 1, key) if FIRST == BF16 else at
        m = tl.where(inside, m, 0.0)
        _store_moment(FIRST, True, first, first_scale, first_lines, at, inside, m, tile, bits)
    if WEIGHT == W_FP32:
        tl.store(weight + at, w, mask=inside)
    elif WEIGHT == W_STOCHASTIC:
        tl.store(weight + at, _brain_plus(w, _draw(at, step, 0, key)), mask=inside)
    elif WEIGHT == W_FP16:
        unit = _last_place(w, 113, 10)
        steps = tl.div_rn(w, unit)  # the plain division is approximate
        lower = tl.floor(steps)
        is_up = (steps - lower) * 65536 > _draw(at, step, 0, key).to(tl.float32)
        rounded = (lower + is_up.to(tl.float32)) * unit
        tl.store(weight + at, rounded.to(tl.float16), mask=inside)
    else:
        kept = _brain(w)
        tl.store(weight + at, kept, mask=inside)
        if WEIGHT == W_KAHAN:
            tl.store(residual + at, _brain(w - kept.to(tl.float32)), mask=inside)
        elif WEIGHT == W_ERROR8:
            kept = kept.to(tl.float32)
            error = tl.div_rn(w - kept, _last_place(kept, 8, 7)) * 254
            lower = tl.floor(error + 0.5)
            tl.store(residual + at, lower.to(tl.int32).to(tl.int8), mask=inside)


@cache
def _lines(of: str, device: torch.device) -> torch.Tensor:
    """Return the lines of a moment's map, and for 4 bits the midpoints of its magnitudes."""
    maps: dict[str, DynamicMap] = {
        "signed 8": SIGNED_8BIT, "unsigned 8": UNSIGNED_8BIT, "signed 4": SIGNED_4BIT
    }  # fmt: skip
    numbers = [number for line in maps[of].lines for number in line]
    magnitudes = maps[of].magnitudes
    if of == "signed 4":
        numbers += [(a + b) / 2 for a, b in zip(magnitudes, magnitudes[1:], strict=False)]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def step_on_cuda(update: Update) -> None:
    """Step one parameter."""
    device = update.parameter.device
    bits4 = STATE_FORMATS["4bit"].code
    first_lines = _lines("signed 4" if update.first.code == bits4 else "signed 8", device)
    arguments: tuple[Any, ...] = (
        update.parameter.detach(), update.residual, update.gradient,
        update.first.values, update.first.scale, update.second.values, update.second.scale,
        first_lines, _lines("unsigned 8", device), update.parameter.numel(),
        update.sign, *update.numbers, update.seed | update.number << 32, update.step,
        update.rule, update.weight_code, update.first.code, update.second.code,
    )  # fmt: skip
    num_tiles = triton.cdiv(update.parameter.numel(), TILE.value)
    with torch.cuda.device_of(update.parameter):
        _step_tile[(num_tiles,)](*arguments, num_warps=2)
