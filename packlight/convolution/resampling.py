"""Adaptive pooling and interpolation on the rows that a rank has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from packlight.convolution.axis import Axis, Rows, SplitLayer, for_all_ranks
from packlight.convolution.layers import per_dim
from packlight.convolution.windows import map_of
from packlight.errors import UnsupportedModelError
from packlight.ranks.collectives import all_reduce
from packlight.ranks.rows import RowMap, Run, bounds_of, runs_of

_ADAPTIVE_MAX: tuple[Any, ...] = (
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
)
_ADAPTIVE_AVERAGE: tuple[Any, ...] = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
)


class _SplitAdaptive(SplitLayer):
    """Pooling to a given size: the result is whole on all ranks, as a classifier needs it."""

    is_whole_after = True

    def windows(self, size: int, out_size: int) -> list[tuple[int, int]]:
        """Return which rows [start, end) each row of the result looks at."""
        return [
            (row * size // out_size, -(-(row + 1) * size // out_size)) for row in range(out_size)
        ]

    def pooled_elsewhere(self, x: torch.Tensor, pool: Any) -> torch.Tensor:
        """Return rows pooled along dimensions that are not cut."""
        sizes = [*per_dim(self.output_size, self.num_dims)]
        for i, size in enumerate(sizes):
            if size is None:
                sizes[i] = x.shape[2 + i]
        cut = {axis.place for axis in self.axes}
        if len(cut) == len(sizes):
            return x
        for i in cut:
            sizes[i] = x.shape[2 + i]
        result: torch.Tensor = pool[len(sizes) - 1](x, sizes)
        return result

    def nothing_needed(self, size: int, num_ranks: int) -> RowMap:
        """Return a map by which every rank goes on with its own rows."""
        return map_of(size, size, num_ranks, lambda first, end: ((first, end - first, 1),))


class SplitAdaptiveAverage(_SplitAdaptive):
    """Averages: each rank adds up what its rows are in each window, then ranks add up."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        shares = torch.zeros(size, out_size, dtype=torch.float64)
        for row, (first, last) in enumerate(self.windows(size, out_size)):
            shares[first:last, row] = 1 / (last - first)
        name = f"_shares_{axis.dim}_{size}"
        self.numbers[name] = for_all_ranks(shares, axis.peers.size)
        same = self.nothing_needed(size, axis.peers.size)
        return Rows(same, size, None, constants=(name,))

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        x = self.pooled_elsewhere(x, _ADAPTIVE_AVERAGE)
        for axis, each in zip(self.axes, rows, strict=True):
            shares = self.own(each.constants[0], axis, each.size).to(x.dtype)
            x = (x.movedim(axis.dim, -1) @ shares).movedim(-1, axis.dim)
            x = cast(torch.Tensor, all_reduce(x, "sum", axis.group_name))
        return x


class SplitAdaptiveMax(_SplitAdaptive):
    """Largest values: of several ranks with the largest, the first one's gets the gradient."""

    def check(self) -> None:
        """As of every layer."""
        if self.return_indices:
            raise UnsupportedModelError("return_indices=True would count places in one rank's rows")

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        self._out_sizes = {**getattr(self, "_out_sizes", {}), (axis.dim, size): out_size}
        return Rows(self.nothing_needed(size, axis.peers.size), size, None)

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        x = self.pooled_elsewhere(x, _ADAPTIVE_MAX)
        for axis, each in zip(self.axes, rows, strict=True):
            start, end = axis.bounds(each.size)
            parts = []
            for first, last in self.windows(each.size, self._out_sizes[axis.dim, each.size]):
                first, last = max(first, start) - start, min(last, end) - start
                if last <= first:
                    parts.append(torch.full_like(x.narrow(axis.dim, 0, 1), -math.inf))
                    continue
                part = x.narrow(axis.dim, first, last - first)
                sizes = [*part.shape[2:]]
                sizes[axis.place] = 1
                parts.append(_ADAPTIVE_MAX[len(sizes) - 1](part, sizes))
            x = _first_of_largest(torch.cat(parts, axis.dim), axis)
        return x


def _first_of_largest(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    value, name = x.detach(), axis.group_name
    ranks = torch.full_like(value, axis.peers.size)
    mine = value == all_reduce(value, "max", name)
    ranks = torch.where(mine, torch.full_like(value, axis.peers.rank), ranks)
    chosen = all_reduce(ranks, "min", name) == axis.peers.rank
    made: torch.Tensor = all_reduce(torch.where(chosen, x, torch.zeros_like(x)), "sum", name)
    return made


class SplitUpsample(SplitLayer):
    """Nearest and (bi-, tri-)linear interpolation, with corners aligned or not."""

    def check(self) -> None:
        """As of every layer."""
        if self.mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
            raise UnsupportedModelError(f"mode={self.mode!r} of interpolation is not there yet")

    def scale(self, place: int) -> float | None:
        """Return the factor that was given for a dimension, if it counts."""
        if self.scale_factor is None or self.recompute_scale_factor:
            return None
        return float(per_dim(self.scale_factor, self.num_dims)[place])

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        low, weights = self._sources(axis, size, out_size)
        high = [row if row == size - 1 else row + 1 for row in low] if weights else low
        starts: list[int] = []
        rows_of_ranks = [(a, b) for a, b in bounds_of(out_size, axis.peers.size) if b > a]

        def needed(first: int, end: int) -> tuple[Run, ...]:
            starts.append(min(low[first:end]))
            return runs_of(range(starts[-1], max(high[first:end]) + 1))

        rows = map_of(size, out_size, axis.peers.size, needed)
        first_needed = torch.tensor([
            start for start, (first, end) in zip(starts, rows_of_ranks, strict=True)
            for _ in range(first, end)
        ])
        numbers = {"low": torch.tensor(low) - first_needed}
        if weights:
            numbers["high"] = torch.tensor(high) - first_needed
            numbers["weights"] = torch.tensor(weights, dtype=torch.float64)
        names = {name: f"_{name}_{axis.dim}_{size}" for name in numbers}
        self.numbers.update(
            (names[name], for_all_ranks(values, axis.peers.size))
            for name, values in numbers.items()
        )
        return Rows(rows, size, out_size, constants=tuple(names.values()))

    def _sources(self, axis: Axis, size: int, out_size: int) -> tuple[list[int], list[float]]:
        """Return the row that each row of the result begins at, and the next one's weight."""
        scale = self.scale(axis.place)
        if self.mode.startswith("nearest"):  # rounded as torch rounds
            line = torch.arange(float(size)).view(1, 1, -1, *[1] * (self.num_dims - 1))
            ones = (1,) * (self.num_dims - 1)
            if scale is None:
                found = F.interpolate(line, size=(out_size, *ones), mode=self.mode)
            else:
                found = F.interpolate(line, scale_factor=(scale, *ones), mode=self.mode)
            return [int(row) for row in found.flatten()], []
        if self.align_corners:
            step = (size - 1) / (out_size - 1) if out_size > 1 else 0.0
            places = [step * row for row in range(out_size)]
        else:
            step = size / out_size if scale is None else 1 / scale
            places = [max(step * (row + 0.5) - 0.5, 0.0) for row in range(out_size)]
        low = [min(int(place), size - 1) for place in places]
        return low, [min(place - row, 1.0) for place, row in zip(places, low, strict=True)]

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        return self.over_rows(x, rows, lambda taken: self._interpolated(taken, rows))

    def _interpolated(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        num_dims, cut = self.num_dims, {axis.place for axis in self.axes}
        if len(cut) < num_dims:
            corners = None if self.mode.startswith("nearest") else self.align_corners
            if self.scale_factor is None:
                sizes = [*per_dim(self.size, num_dims)]
                for i in cut:
                    sizes[i] = x.shape[2 + i]
                x = F.interpolate(x, sizes, mode=self.mode, align_corners=corners)
            else:
                factors = [*per_dim(self.scale_factor, num_dims)]
                for i in cut:
                    factors[i] = 1.0
                x = F.interpolate(
                    x, scale_factor=factors, mode=self.mode, align_corners=corners,
                    recompute_scale_factor=self.recompute_scale_factor,
                )
        for axis, each in zip(self.axes, rows, strict=True):
            assert each.out_size is not None
            low, *more = (self.own(name, axis, each.out_size) for name in each.constants)
            below = x.index_select(axis.dim, low)
            if not more:
                x = below
                continue
            high, weights = more
            weights = weights.to(x.dtype).view(-1, *[1] * (x.ndim - 1 - axis.dim))
            x = torch.lerp(below, x.index_select(axis.dim, high), weights)
        return x
