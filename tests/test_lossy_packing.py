"""Values in few bits: right on average, within a step, and the same bits wherever they are made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from packlight.errors import OptionError
from packlight.lossy import packing
from packlight.lossy.packing import BITS, GROUP, pack_values, packed_bytes, unpack_values

SIZES = (0, 1, 3, 255, 256, 257, 5000)
DTYPES = pytest.mark.parametrize("dtype", packing.DTYPES, ids=str)


def numbers(count: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(count))).to(dtype)


def round_trip(values: torch.Tensor, bits: int, seed: int = 0) -> torch.Tensor:
    packed = pack_values(values, bits, seed, values.stride())
    assert packed.nbytes == packed_bytes(values.numel(), bits)
    return unpack_values(packed, bits, values.shape, values.stride(), values.dtype)


def steps_of(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Each element's step, written out in float64: a group's extent over the number of steps."""
    groups = values.double().split(GROUP)
    return torch.cat([
        ((part.max() - part.min()) / (2**bits - 1)).expand(len(part)) for part in groups
    ])


@pytest.mark.parametrize("bits", BITS)
@DTYPES
def test_every_value_comes_back_within_one_step(bits: int, dtype: torch.dtype) -> None:
    for count in SIZES[1:]:
        values = numbers(count, dtype)
        error = (round_trip(values, bits).double() - values.double()).abs()
        rounding = values.double().abs() * torch.finfo(dtype).eps
        assert bool((error <= steps_of(values, bits) * (1 + 1e-5) + rounding + 1e-6).all()), count


@pytest.mark.parametrize("bits", BITS)
@DTYPES
def test_kernels_and_operators_make_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    for count in SIZES:
        values = numbers(count, dtype)
        if count == 5000:
            values[300], values[900], values[1500] = math.nan, math.inf, -math.nan
        mine = pack_values(values, bits, 7, (1,))
        packed = torch.empty_like(mine)
        parts = packing._parts(packed, count)
        packing._pack_by_operators(values, bits, 7, *parts)
        assert torch.equal(mine, packed) or count == 5000  # (NaNs differ in bits that mean nothing)
        other = torch.empty_like(values)
        packing._unpack_by_operators(*parts, bits, other)
        torch.testing.assert_close(
            unpack_values(mine, bits, (count,), (1,), dtype), other, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("bits", BITS)
def test_values_are_right_on_average(bits: int) -> None:
    values, draws = numbers(600), 400
    mean = sum(round_trip(values, bits, seed).double() for seed in range(draws)) / draws
    steps = steps_of(values, bits)
    # A draw's deviation is at most half a step; of 600 means one is 4.5 of their own off in 10^3.
    assert float(((mean - values).abs() / steps).max()) < 4.5 * 0.5 / math.sqrt(draws)
    assert abs(float(((mean - values) / steps).mean())) < 4 * 0.5 / math.sqrt(draws * len(values))


def test_draws_of_other_seeds_are_independent() -> None:
    values = numbers(4096)
    errors = [round_trip(values, 4, seed) - values for seed in range(8)]
    correlations = np.corrcoef(torch.stack(errors).numpy())
    assert np.abs(correlations - np.eye(8)).max() < 5 / math.sqrt(4096)


def test_what_is_packed_twice_has_the_same_bits_whatever_the_threads() -> None:
    values = numbers(3 * 256 * 256)
    first = pack_values(values, 4, 1, (1,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(pack_values(values, 4, 1, (1,)), first)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(pack_values(values, 4, 2, (1,)), first)


def test_dims_in_another_order_are_packed_as_they_lie() -> None:
    values = numbers(2 * 3 * 8 * 9).view(2, 3, 8, 9).to(memory_format=torch.channels_last)
    again = round_trip(values, 8)
    assert again.stride() == values.stride()
    torch.testing.assert_close(again, values, rtol=0, atol=0.1)
    contiguous = pack_values(values, 8, 0, values.contiguous().stride())
    assert torch.equal(contiguous, pack_values(values.contiguous(), 8, 0, (216, 72, 9, 1)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_values_keep_their_relative_error(scale: float) -> None:
    values = numbers(1000)
    error = (round_trip(values * scale, 8).double() / scale - values.double()).norm()
    assert error / values.double().norm() < 0.02


def test_a_group_of_equal_values_is_exact() -> None:
    values = torch.full((700,), 0.1)
    assert torch.equal(round_trip(values, 2), values)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        values = numbers(3 * GROUP)
        values[GROUP + 5] = odd
        again = round_trip(values, 2)
        assert bool(again[GROUP : 2 * GROUP].isnan().all())
        assert bool(again[:GROUP].isfinite().all() and again[2 * GROUP :].isfinite().all())


@pytest.mark.parametrize(("values", "bits", "words"), [
    (torch.zeros(4), 3, "3 bits"),
    (torch.zeros(4, dtype=torch.float64), 8, "float64"),
    (torch.zeros(4, 4)[:, :2], 8, "gaps"),
])
def test_what_cannot_be_packed_is_refused_by_name(
    values: torch.Tensor, bits: int, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        pack_values(values, bits, 0, values.stride())
