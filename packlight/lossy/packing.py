"""Values in 8, 4 or 2 bits: groups of 256, stochastic rounding, unbiased.

Chen et al. 2021, "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed
Training": a group's values are cut into 2^bits - 1 equal steps from its least to its largest, and
each is rounded up or down at random, so that what is unpacked is right on average.

Random bits are a hash of a seed, of what is packed and of the element: no generator is asked. So
forwards draw what they drew before, a step that is run again or resumed from a checkpoint has the
same bits, and packing twice gives the same codes. What is the same in every step is rounded in
the same way in every step.

A group with a number that is not finite, or whose extent is not, is unpacked as NaN: codes hide
nothing. Where a group's steps are less than float32's smallest normal number, all its values are
unpacked as the least of them.

On the CPU, kernels are compiled by numba; elsewhere the same bits are made by torch's operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from packlight.errors import OptionError
from packlight.lossy.arrays import (
    DTYPES,
    GROUP,
    check_layout,
    compiled,
    laid_out,
    pieces,
    shares,
    words_of,
)
from packlight.threads import run_in_threads

BITS = (8, 4, 2)
_SCALE_BYTES = 8  # of each group: its least value and its step
_MASK = 0xFFFFFFFF


def packed_bytes(num_elements: int, bits: int) -> int:
    """Return how many bytes so many elements take once they are packed."""
    full, rest = divmod(num_elements, GROUP)
    num_groups = full + (rest > 0)
    return num_groups * _SCALE_BYTES + full * (GROUP * bits // 8) + math.ceil(rest * bits / 8)


@torch.library.custom_op("packlight::pack_values", mutates_args=())
def pack_values(
    values: torch.Tensor, bits: int, seed: int, stride: Sequence[int]
) -> torch.Tensor:
    """Return values in few bits.

    Args:
        values: float32, bfloat16 or float16, of any shape.
        bits: of each, one of `BITS`.
        seed: what is rounded up and what down depends on it.
        stride: without gaps in memory, as they will be unpacked; values that lie otherwise are
            copied first.

    Returns:
        uint8, one-dimensional: see `packed_bytes`.

    Raises:
        OptionError: other bits, another dtype, or strides with gaps.
        MissingExtraError: numba is not installed, and the values are on the CPU.
    """
    values = laid_out(values, stride)
    _check(values, bits)
    num_elements = values.numel()
    packed = torch.empty(packed_bytes(num_elements, bits), dtype=torch.uint8, device=values.device)
    elements = values.as_strided((num_elements,), (1,))
    seed &= _MASK
    lows, steps, codes = _parts(packed, num_elements)
    if values.device.type != "cpu":
        _pack_by_operators(elements, bits, seed, lows, steps, codes)
        return packed
    kernels = compiled()
    for first, last in pieces(values):
        piece, shift = words_of(elements[first * GROUP : last * GROUP].detach())
        at = GROUP * bits // 8
        run_in_threads(kernels.pack, [
            (piece[(a - first) * GROUP : (b - first) * GROUP], shift, bits, seed, a,
             lows[a:b].numpy(), steps[a:b].numpy(), codes[a * at : b * at].numpy())
            for a, b in shares(first, last)
        ])
    return packed


@pack_values.register_fake
def _(values: torch.Tensor, bits: int, seed: int, stride: Sequence[int]) -> torch.Tensor:
    return values.new_empty(packed_bytes(values.numel(), bits), dtype=torch.uint8)


@torch.library.custom_op("packlight::unpack_values", mutates_args=())
def unpack_values(
    packed: torch.Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the values of that size, stride and dtype behind what `pack_values` made."""
    values = torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
    _check(values, bits)
    num_elements = values.numel()
    elements = values.as_strided((num_elements,), (1,))
    lows, steps, codes = _parts(packed, num_elements)
    if packed.device.type != "cpu":
        _unpack_by_operators(lows, steps, codes, bits, elements)
        return values
    kernels = compiled()
    for first, last in pieces(values):
        piece = elements[first * GROUP : last * GROUP]
        wide = piece if dtype is not torch.float16 else piece.float()
        words, shift = words_of(wide)
        at = GROUP * bits // 8
        run_in_threads(kernels.unpack, [
            (codes[a * at : b * at].numpy(), lows[a:b].numpy(), steps[a:b].numpy(), bits,
             shift > 0, words[(a - first) * GROUP : (b - first) * GROUP])
            for a, b in shares(first, last)
        ])
        if wide is not piece:
            piece.copy_(wide)
    return values


@unpack_values.register_fake
def _(
    packed: torch.Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=packed.device)


def prepare(device: torch.device) -> None:
    """Compile what there is to compile for a device, so that nothing that is timed does.

    Raises:
        MissingExtraError: the device is the CPU, and numba is not installed.
    """
    if device.type == "cpu":
        for dtype in DTYPES:
            for bits in BITS:
                packed = pack_values(torch.zeros(1, dtype=dtype), bits, 0, (1,))
                unpack_values(packed, bits, (1,), (1,), dtype)


def _check(values: torch.Tensor, bits: int) -> None:
    if bits not in BITS:
        raise OptionError(f"values cannot be packed to {bits!r} bits\nhint: known are 8, 4 and 2")
    check_layout(values)


def _parts(
    packed: torch.Tensor, num_elements: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views of each group's least value, of its step, and of all codes."""
    num_groups = -(-num_elements // GROUP)
    scales = packed[: num_groups * _SCALE_BYTES].view(torch.float32)
    return scales[:num_groups], scales[num_groups:], packed[num_groups * _SCALE_BYTES :]


# -- the same by torch's operators, on any device


def _pack_by_operators(
    elements: torch.Tensor, bits: int, seed: int, lows: torch.Tensor, steps: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    groups = _in_groups(elements)
    levels = float(2**bits - 1)
    # The order of the integers behind the floats: the kernel's, in which NaN is outside.
    inside = torch.arange(groups.numel(), device=elements.device).view_as(groups) < len(elements)
    places = _in_order(groups.view(torch.int32))
    low = _in_order(torch.where(inside, places, 2**31 - 1).amin(1)).view(torch.float32)
    high = _in_order(torch.where(inside, places, -(2**31)).amax(1)).view(torch.float32)
    extent = high - low
    step = extent / levels
    inverse = torch.where(step >= 2.0**-126, 1.0 / step, 0.0)
    is_finite = extent <= torch.finfo(torch.float32).max
    low = torch.where(is_finite, low, math.nan)
    step, inverse = (torch.where(is_finite, part, 0.0) for part in (step, inverse))
    lows.copy_(low)
    steps.copy_(step)
    keys = _mixed((_mixed(_unsigned(low) ^ seed) + _unsigned(step)) & _MASK)
    place = torch.arange(len(low), device=low.device)
    keys = (keys + place * 0x9E3779B9) & _MASK
    within = torch.arange(GROUP // 2, device=low.device)
    words = _mixed((keys[:, None] + within) & _MASK)
    chances = torch.cat([words & 0xFFFF, words >> 16], 1).float() * 2.0**-16 + 2.0**-17
    position = (groups - low[:, None]) * inverse[:, None] + chances
    found = position.nan_to_num(0.0).clamp(0.0, levels).to(torch.uint8)
    _in_planes(codes, bits, len(elements), found, is_packing=True)


def _unpack_by_operators(
    lows: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, bits: int, elements: torch.Tensor
) -> None:
    found = torch.empty(len(lows), GROUP, dtype=torch.uint8, device=codes.device)
    _in_planes(codes, bits, len(elements), found, is_packing=False)
    groups = lows[:, None] + found.float() * steps[:, None]
    elements.copy_(groups.view(-1)[: len(elements)])


def _in_planes(
    codes: torch.Tensor, bits: int, num_elements: int, found: torch.Tensor, *, is_packing: bool
) -> None:
    """Move single codes, one row for each group, into bytes or out of them."""
    full, rest = divmod(num_elements, GROUP)
    at = full * (GROUP * bits // 8)
    for rows, part, count in (
        (found[:full], codes[:at].view(full, GROUP * bits // 8), GROUP),
        (found[full:], codes[None, at:], rest),
    ):
        if not rows.numel():
            continue
        per_byte = 8 // bits
        stride = -(-count // per_byte)
        if is_packing:
            part.zero_()
        for plane in range(per_byte):
            mine = rows[:, plane * stride : min((plane + 1) * stride, count)]
            there = part[:, : mine.shape[1]]
            if is_packing:
                there.bitwise_or_(mine << (plane * bits))
            else:
                mine.copy_((there >> (plane * bits)) & (2**bits - 1))


def _in_groups(elements: torch.Tensor) -> torch.Tensor:
    num_groups = -(-len(elements) // GROUP)
    groups = torch.zeros(num_groups * GROUP, dtype=torch.float32, device=elements.device)
    groups[: len(elements)] = elements
    return groups.view(num_groups, GROUP)


def _in_order(bits: torch.Tensor) -> torch.Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unsigned(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32).to(torch.int64) & _MASK


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Return Wellons' hash lowbias32 of words of 32 bits that are kept in int64."""
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & _MASK
    words = ((words ^ (words >> 15)) * 0x846CA68B) & _MASK
    return words ^ (words >> 16)
