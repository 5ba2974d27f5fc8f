"""Dropout whose mask is a function of a seed and of positions in the whole sample.

Position i of a tensor, counted as on one device, is kept where hash(seed + i * G) / 2^53 >= p, with
the finalizer of SplitMix64 (Steele, Lea and Flood 2014) and its constant G. Ranks that draw the
same seed have, put together, the mask of one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packlight.convolution.axis import Axis, Rows, SplitLayer
from packlight.convolution.windows import map_of
from packlight.ranks.collectives import members
from packlight.ranks.rows import bounds_of

# Of SplitMix64, as signed 64-bit numbers.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
# So many numbers are made at a time: a mask takes a byte for each, they take eight.
_AT_A_TIME = 2**14


@torch.library.custom_op("packlight::position_mask", mutates_args=())
def position_mask(
    seed: torch.Tensor, like: torch.Tensor, num_features: int, dims: Sequence[int],
    sizes: Sequence[int], group_names: str, p: float,
) -> torch.Tensor:
    """Return which elements are kept, bool.

    Args:
        seed: int64, of no dimensions.
        like: this rank's rows.
        num_features: dimensions of a mask, from the first; further ones are 1.
        dims: those that are cut.
        sizes: theirs, on all ranks together.
        group_names: of their ranks, one after the other, with spaces between.
        p: the share that is dropped.
    """
    shape = _mask_shape(like, num_features)
    whole, starts = [*shape], [0] * len(shape)
    for dim, size, name in zip(dims, sizes, group_names.split(), strict=True):
        if dim < num_features:
            ranks = members(name)
            whole[dim], starts[dim] = size, bounds_of(size, ranks.size)[ranks.rank][0]
    mask = torch.empty(shape, dtype=torch.bool, device=like.device)
    flat = mask.view(-1)
    for first in range(0, mask.numel(), _AT_A_TIME):
        left = torch.arange(first, min(first + _AT_A_TIME, mask.numel()), device=like.device)
        place, stride = torch.zeros_like(left), 1
        for size, whole_size, start in zip(shape[::-1], whole[::-1], starts[::-1], strict=True):
            place += (left % size + start) * stride
            left = left.div_(size, rounding_mode="floor")
            stride *= whole_size
        drawn = _hashed(place.mul_(_STEP).add_(seed))
        flat[first : first + len(drawn)] = drawn.double().mul_(2.0**-53) >= p
    return mask


@position_mask.register_fake
def _(
    seed: torch.Tensor, like: torch.Tensor, num_features: int, dims: Sequence[int],
    sizes: Sequence[int], group_names: str, p: float,
) -> torch.Tensor:
    return like.new_empty(_mask_shape(like, num_features), dtype=torch.bool)


def _mask_shape(like: torch.Tensor, num_features: int) -> list[int]:
    return [*like.shape[:num_features], *[1] * (like.ndim - num_features)]


def _hashed(z: torch.Tensor) -> torch.Tensor:
    """Return 53 random bits for each number."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return _shifted(z ^ _shifted(z, 31), 11)


def _shifted(z: torch.Tensor, count: int) -> torch.Tensor:
    """Shift right, with zeros coming in."""
    return (z >> count) & ((1 << (64 - count)) - 1)


class SplitDropout(SplitLayer):
    """Dropout of elements, or of channels, with one device's mask."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        same = map_of(size, size, axis.peers.size, lambda first, end: ((first, end - first, 1),))
        return Rows(same, size, out_size)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        is_of_channels = type(self).__name__.endswith("d")
        seed = torch.randint(2**62, (), dtype=torch.int64)
        mask = position_mask(
            seed, x.detach(), 2 if is_of_channels else x.ndim, [a.dim for a in self.axes],
            [each.size for each in rows], " ".join(a.group_name for a in self.axes), self.p,
        )
        made: torch.Tensor = x * (1 / (1 - self.p)) * mask
        return made
