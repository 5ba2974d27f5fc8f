"""Convolutions, pooling, padding and upsampling on the rows that a rank has.

Each asks for the rows that its own rows of the result look at, with padding filled in, and runs
without padding along dimensions that are cut: what it computes is what one device computes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from packlight.convolution.axis import Axis, Rows, SplitLayer, for_all_ranks
from packlight.convolution.windows import (
    Window,
    map_of,
    padded_row,
    repeated_map,
    transposed_map,
    window_map,
)
from packlight.errors import UnsupportedModelError
from packlight.ranks.rows import runs_of

_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def per_dim(setting: Any, num_dims: int) -> tuple[Any, ...]:
    """Return a layer's setting for each of its spatial dimensions."""
    return tuple(setting) if isinstance(setting, (tuple, list)) else (setting,) * num_dims


def pads_of(layer: Any) -> list[tuple[int, int]]:
    """Return a convolution's rows of padding before and behind each spatial dimension."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in layer.padding]


def convolved(
    layer: Any, x: torch.Tensor, pads: Sequence[tuple[int, int]], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what a convolution makes of its input with so many rows of padding."""
    padding = tuple(before for before, _ in pads)
    is_even = all(before == behind for before, behind in pads)
    if any(map(any, pads)) and not (is_even and layer.padding_mode == "zeros"):
        flat = [pad for pair in reversed(pads) for pad in pair]
        x = F.pad(x, flat, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        padding = (0,) * len(pads)
    result: torch.Tensor = _CONVOLVE[len(pads) - 1](
        x, layer.weight, bias, layer.stride, padding, layer.dilation, layer.groups
    )
    return result


def transposed(
    layer: Any, x: torch.Tensor, padding: Sequence[int], more: Sequence[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a transposed convolution makes of its input.

    Args:
        layer: it.
        x: the input.
        padding: rows that are cut off at both ends.
        more: rows that are added behind.
        bias: of each channel.
    """
    result: torch.Tensor = _TRANSPOSED[len(padding) - 1](
        x, layer.weight, bias, layer.stride, padding, more, layer.groups, layer.dilation
    )
    return result


class SplitConvolution(SplitLayer):
    """A convolution: any kernel, stride, dilation, groups and padding mode."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        i = axis.place
        window = Window(
            self.kernel_size[i], self.stride[i], self.dilation[i], pads_of(self)[i][0],
            self.padding_mode,
        )
        return Rows(window_map(size, out_size, axis.peers.size, window), size, out_size)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        pads = pads_of(self)
        for axis in self.axes:
            pads[axis.place] = (0, 0)
        return self.over_rows(x, rows, lambda taken: convolved(self, taken, pads, self.bias))


class SplitTransposed(SplitLayer):
    """A transposed convolution: what it makes of rows further out is cut off."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        i = axis.place
        window = Window(self.kernel_size[i], self.stride[i], self.dilation[i], self.padding[i])
        made = transposed_map(size, out_size, axis.peers.size, window)
        return Rows(made.rows, size, out_size, made.before)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        padding, more = [*self.padding], [*self.output_padding]
        for axis in self.axes:
            padding[axis.place] = more[axis.place] = 0
        return self.over_rows(x, rows, lambda taken: cropped(
            transposed(self, taken, padding, more, self.bias), self.axes, rows
        ))


def cropped(made: torch.Tensor, axes: Sequence[Axis], rows: Sequence[Rows]) -> torch.Tensor:
    """Return this rank's rows of what was made of the rows that it needed."""
    for axis, each in zip(axes, rows, strict=True):
        assert each.out_size is not None
        made = made.narrow(axis.dim, each.before[axis.peers.rank], axis.num_rows(each.out_size))
    return made


class _SplitPooling(SplitLayer):
    """Pooling in windows."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        kernel, stride, dilation, pad = (
            per_dim(setting, self.num_dims)[axis.place]
            for setting in (
                self.kernel_size, self.stride, getattr(self, "dilation", 1), self.padding
            )
        )
        window = Window(kernel, stride, dilation, pad)
        return Rows(window_map(size, out_size, axis.peers.size, window), size, out_size)

    def other_padding(self) -> list[int]:
        """Return padding along dimensions that are not cut."""
        padding = [*per_dim(self.padding, self.num_dims)]
        for axis in self.axes:
            padding[axis.place] = 0
        return padding


class SplitMaxPool(_SplitPooling):
    """The largest of a window; rows of padding are smaller than any."""

    fill = float("-inf")

    def check(self) -> None:
        """As of every layer."""
        if self.return_indices:
            raise UnsupportedModelError("return_indices=True would count places in one rank's rows")

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        pool = _MAX[self.num_dims - 1]
        return self.over_rows(x, rows, lambda taken: pool(
            taken, self.kernel_size, self.stride, self.other_padding(), self.dilation,
            self.ceil_mode,
        ))


class SplitAveragePool(_SplitPooling):
    """The average of a window: windows at a border have as many rows as on one device."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        rows = super().rows_along(axis, size, out_size)
        if getattr(self, "divisor_override", None) is not None:
            return rows
        kernel, stride, pad = (
            per_dim(setting, self.num_dims)[axis.place]
            for setting in (self.kernel_size, self.stride, self.padding)
        )
        starts = [row * stride - pad for row in range(out_size)]
        ends = [min(start + kernel, size + pad) for start in starts]
        if not self.count_include_pad:
            starts, ends = [max(s, 0) for s in starts], [min(e, size) for e in ends]
        shares = [kernel / (end - start) for start, end in zip(starts, ends, strict=True)]
        if self.count_include_pad and (out_size - 1) * stride - pad + kernel <= size + pad:
            return rows  # whole windows on all ranks
        name = f"_shares_{axis.dim}_{size}"
        self.numbers[name] = for_all_ranks(
            torch.tensor(shares, dtype=torch.float64), axis.peers.size
        )
        return Rows(rows.map, size, out_size, constants=(name,))

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        pool = _AVERAGE[self.num_dims - 1]
        more = () if self.num_dims == 1 else (self.divisor_override,)
        made = self.over_rows(x, rows, lambda taken: pool(
            taken, self.kernel_size, self.stride, self.other_padding(), self.ceil_mode,
            self.count_include_pad, *more,
        ))
        for axis, each in zip(self.axes, rows, strict=True):
            for name in each.constants:
                assert each.out_size is not None
                shares = self.own(name, axis, each.out_size).to(made.dtype)
                made = made * shares.view(-1, *[1] * (made.ndim - 1 - axis.dim))
        return made


class SplitPadding(SplitLayer):
    """A layer that pads, in any mode: rows of other ranks where these are what it pads with."""

    @property
    def mode(self) -> str:
        """Of the padding, as convolutions name it."""
        name = type(self).__name__.removeprefix("Split")
        kinds = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
        return next((mode for kind, mode in kinds.items() if name.startswith(kind)), "zeros")

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        before = self.padding[-2 * (axis.place + 1)]
        self.fill = float(getattr(self, "value", 0.0))
        rows = map_of(size, out_size, axis.peers.size, lambda first, end: runs_of(
            padded_row(row - before, size, self.mode) for row in range(first, end)
        ))
        return Rows(rows, size, out_size)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        flat = [*self.padding]
        for axis in self.axes:
            flat[-2 * (axis.place + 1)] = flat[-2 * (axis.place + 1) + 1] = 0
        mode = "constant" if self.mode == "zeros" else self.mode
        value = self.fill if mode == "constant" else None
        return self.over_rows(
            x, rows, lambda taken: F.pad(taken, flat, mode, value) if any(flat) else taken
        )


class SplitPixelShuffle(SplitLayer):
    """Channels become rows and columns."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        made = repeated_map(size, self.upscale_factor, axis.peers.size)
        return Rows(made.rows, size, out_size, made.before)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        return self.over_rows(x, rows, lambda taken: cropped(
            F.pixel_shuffle(taken, self.upscale_factor), self.axes, rows
        ))
