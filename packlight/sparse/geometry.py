"""Where a sparse kernel finds the elements that a column of a weight meets.

A convolution is a sum over the nonzeros of its weight: output channel o gets v * (input channel c,
shifted by a tap). Laid out with the batch innermost and padded, with one plane for each remainder
of the stride, every such shift is one offset, and the shifted plane one contiguous vector. A linear
layer is the case of one tap and planes of one element. So all kernels know is `places`: at which
offset the vector of a column starts, and `length`, how long it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch

# A tile of inputs of so many bytes stays in a core's second cache while outputs are computed.
TILE_BYTES = 2**19
# Vectors shorter than this spend their time on loops, longer than the latter in no first cache.
MIN_VECTOR, MAX_VECTOR = 64, 2048


@dataclass(frozen=True)
class Geometry:
    """A product of a sparse weight with a batch.

    Attributes:
        batch: number of rows.
        weight_shape: (out, in / groups, *kernel).
        input_size, output_size: of the one or two dimensions of space, (1, 1) of a linear layer.
        kernel, stride, padding, dilation: two numbers each.
        groups: of channels, as in `torch.nn.Conv2d`.
    """

    batch: int
    weight_shape: tuple[int, ...]
    input_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """Return the geometry of a call; dimensions of space that are missing have size 1."""

        def two(numbers: Sequence[int], missing: int) -> tuple[int, int]:
            first, second = [missing] * (2 - len(numbers)) + [int(n) for n in numbers]
            return first, second

        return cls(
            int(input_shape[0]), tuple(map(int, weight_shape)), two(input_shape[2:], 1),
            two(weight_shape[2:], 1), two(stride, 1), two(padding, 0), two(dilation, 1), groups,
        )

    @property
    def num_columns(self) -> int:
        """Of the weight as a matrix: (in / groups) * taps."""
        return prod(self.weight_shape[1:])

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.weight_shape[1] * self.groups

    @property
    def output_size(self) -> tuple[int, int]:
        """Of the dimensions of space."""
        high, wide = (
            (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
            for size, pad, spread, taps, step in zip(
                self.input_size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return high, wide

    @property
    def plane(self) -> tuple[int, int]:
        """Size of what one remainder of the stride leaves of a padded channel."""
        high, wide = (
            -(-(size + 2 * pad) // step)
            for size, pad, step in zip(self.input_size, self.padding, self.stride, strict=True)
        )
        return high, wide

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Remainders of the stride that taps have."""
        return sorted({phase for phase, _ in self._taps()})

    @property
    def leaves_out(self) -> bool:
        """Whether some elements of the input may meet no tap."""
        steps = zip(self.stride, self.kernel, self.dilation, strict=True)
        return any(step > 1 and (taps < step or spread > 1) for step, taps, spread in steps)

    def _taps(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yield (remainder, shift in its plane) of each tap, in the order of a weight's columns."""
        for tap in product(*map(range, self.kernel)):
            moves = [at * spread for at, spread in zip(tap, self.dilation, strict=True)]
            (a, b), (c, d) = self.stride, moves
            yield (c % a, d % b), (c // a, d // b)

    def tile_rows(self) -> int:
        """Return how many rows of the batch are laid out at a time."""
        per_row = 4 * self.channels * len(self.phases) * prod(self.plane)
        fewest = -(-MIN_VECTOR // (self.output_size[0] * self.plane[1]))
        most = max(MAX_VECTOR // prod(self.plane), fewest)
        return max(1, min(self.batch, most, max(TILE_BYTES // per_row, fewest)))

    def vector(self, rows: int) -> int:
        """Return how many elements an output channel has for so many rows, gaps included."""
        return ((self.output_size[0] - 1) * self.plane[1] + self.output_size[1]) * rows

    def chunk(self, rows: int) -> int:
        """Return how much of that vector is computed at a time, so that inputs stay in cache."""
        cached = TILE_BYTES // (4 * self.channels * len(self.phases))
        return min(self.vector(rows), max(256, min(cached, MAX_VECTOR)))

    def input_shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of laid out inputs."""
        return (self.channels, len(self.phases), *self.plane, rows)

    def output_shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of laid out outputs: rows have gaps, as long as the planes' ones."""
        return (self.weight_shape[0], self.output_size[0], self.plane[1], rows)

    def group_pitch(self, rows: int) -> int:
        """Return how many laid out elements lie between two groups of channels."""
        return self.weight_shape[1] * len(self.phases) * prod(self.plane) * rows

    def windows(self) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Yield (phase, its window in an image, its window in the phase's plane)."""
        for number, phase in enumerate(self.phases):
            image, plane = [], []
            for at, step, pad, size, length in zip(
                phase, self.stride, self.padding, self.input_size, self.plane, strict=True
            ):
                skipped = max(0, -(-(pad - at) // step))
                start = at + step * skipped - pad
                count = max(0, min(length - skipped, -(-(size - start) // step)))
                image.append(slice(start, start + step * count, step))
                plane.append(slice(skipped, skipped + count))
            yield number, tuple(image), tuple(plane)


@lru_cache(maxsize=256)
def places(geometry: Geometry, rows: int) -> np.ndarray:
    """Return at which offset of laid out inputs each column's vector starts (int64)."""
    numbers = {phase: number for number, phase in enumerate(geometry.phases)}
    high, wide = geometry.plane
    taps = [
        numbers[phase] * high * wide + down * wide + right
        for phase, (down, right) in geometry._taps()
    ]
    channels = np.arange(geometry.weight_shape[1]) * len(numbers) * high * wide
    return np.ascontiguousarray((channels[:, None] + np.array(taps)).reshape(-1) * rows, np.int64)


def lay_out_inputs(geometry: Geometry, images: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows (n, channels, high, wide) of any strides and dtype into planes, padded with 0."""
    out.zero_()
    for number, image, plane in geometry.windows():
        source = images[:, :, image[0], image[1]].permute(1, 2, 3, 0)
        out[:, number, plane[0], plane[1]].copy_(source)


def gather_inputs(geometry: Geometry, laid_out: torch.Tensor, images: torch.Tensor) -> None:
    """Copy planes back; elements that no plane holds are left as they are."""
    for number, image, plane in geometry.windows():
        source = laid_out[:, number, plane[0], plane[1]].permute(3, 0, 1, 2)
        images[:, :, image[0], image[1]].copy_(source)


def lay_out_outputs(geometry: Geometry, images: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows (n, channels, high, wide) into laid out outputs, with zeros in the gaps."""
    wide = geometry.output_size[1]
    out[:, :, wide:].zero_()
    out[:, :, :wide].copy_(images.permute(1, 2, 3, 0))


def gather_outputs(geometry: Geometry, laid_out: torch.Tensor, images: torch.Tensor) -> None:
    """Copy laid out outputs back."""
    images.copy_(laid_out[:, :, : geometry.output_size[1]].permute(3, 0, 1, 2))
