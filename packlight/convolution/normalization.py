"""Batch, group and instance norm whose statistics are those of all ranks' rows.

With x of a set of elements (a channel in all samples; a group of channels in one), n of them:

    y  = (x - mean) * r * weight + bias,    r = 1 / sqrt(var + eps)
    dx = r * (g - sum(g) / n - x' * sum(g * x') / n),    g = dy * weight,  x' = (x - mean) * r

Ranks add up their rows' sums: first the mean's, then squares of what is left, so that neither
cancels; in the backward both at once. x is all that is kept of it, and no more is made than dx.
Ioffe and Szegedy 2015, arXiv 1502.03167; Wu and He 2018, arXiv 1803.08494.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from packlight.convolution.axis import Axis, Rows, SplitLayer
from packlight.convolution.windows import map_of
from packlight.errors import UnsupportedModelError
from packlight.ranks.collectives import all_reduce

_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sets:
    """Which elements have one mean and one variance.

    Attributes:
        num_groups: of channels, each in one sample; None for a channel in all samples.
        num_positions: of a sample, on all ranks together.
        group_names: of the ranks along each axis.
    """

    num_groups: int | None
    num_positions: int
    group_names: tuple[str, ...]

    def num_elements(self, num_samples: int, num_channels: int) -> int:
        """Return how many elements a set has on all ranks."""
        if self.num_groups is None:
            return num_samples * self.num_positions
        return num_channels // self.num_groups * self.num_positions

    def total(self, table: torch.Tensor) -> torch.Tensor:
        """Return sums over sets and ranks of a table (..., samples, channels), in its shape."""
        if self.num_groups is None:
            sums = table.sum(-2, keepdim=True)
        else:
            sums = table.view(*table.shape[:-1], self.num_groups, -1).sum(-1)
        for name in self.group_names:
            sums = all_reduce(sums, "sum", name)
        if self.num_groups is None:
            return sums.expand(table.shape)
        return sums.repeat_interleave(table.shape[-1] // self.num_groups, -1)


def statistics(x: torch.Tensor, sets: Sets) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance (of the sample, not unbiased) as tables (samples, channels)."""
    variance, mean = torch.var_mean(x, [*range(2, x.ndim)], correction=0)
    num_here, num_all = prod(x.shape[2:]), sets.num_elements(*x.shape[:2])
    whole_mean = sets.total(mean * num_here) / num_all
    squares = (variance + (mean - whole_mean) ** 2) * num_here
    return whole_mean, sets.total(squares) / num_all


class _Normalize(torch.autograd.Function):
    """The formulas above, for given statistics of x: the derivative is that of all of it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
        mean: torch.Tensor, variance: torch.Tensor, eps: float, sets: Sets,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.sets, ctx.has_bias = eps, sets, bias is not None
        factor = torch.rsqrt(variance + eps)
        if weight is not None:
            factor = factor * weight
        shift = -mean * factor
        if bias is not None:
            shift = shift + bias
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(factor, x))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        sets: Sets = ctx.sets
        table_shape = x.shape[:2]
        # As if every channel of every sample were a channel: sums without anything of x's size.
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            gradient.reshape(1, -1, *x.shape[2:]), x.reshape(1, -1, *x.shape[2:]), None,
            mean.reshape(-1), variance.reshape(-1), None, None, False, ctx.eps,
            [False, True, True],
        )
        products, sums = products.view(table_shape), sums.view(table_shape)
        scale = torch.ones_like(sums) if weight is None else weight.expand(table_shape)
        num_all = sets.num_elements(*table_shape)
        both = sets.total(torch.stack([products * scale, sums * scale])) / num_all
        r = torch.rsqrt(variance + ctx.eps)
        slope = -r * r * both[0]
        shift = -r * both[1] - slope * mean
        dx = torch.addcmul(_per_channel(shift, x), x, _per_channel(slope, x))
        dx = torch.addcmul(dx, gradient, _per_channel(r * scale, x))
        weight_gradient = None if weight is None else products.sum(0)
        return dx, weight_gradient, sums.sum(0) if ctx.has_bias else None, None, None, None, None


def _per_channel(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return table.reshape(*table.shape, *[1] * (x.ndim - 2))


class _SplitNorm(SplitLayer):
    """Its sums are made by all ranks."""

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """As of every layer."""
        same = map_of(size, size, axis.peers.size, lambda first, end: ((first, end - first, 1),))
        return Rows(same, size, out_size)

    def sets(self, x: torch.Tensor, rows: Sequence[Rows], num_groups: int | None) -> Sets:
        """Return which elements belong together."""
        sizes = [*x.shape[2:]]
        for axis, each in zip(self.axes, rows, strict=True):
            sizes[axis.place] = each.size
        return Sets(num_groups, prod(sizes), tuple(axis.group_name for axis in self.axes))

    def normalized(
        self, x: torch.Tensor, sets: Sets
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the layer's result, and the statistics."""
        dtype = x.dtype
        if dtype in _LOW_PRECISION:  # as kernels do inside
            x = x.float()
        with torch.no_grad():
            mean, variance = statistics(x.detach(), sets)
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        made = _Normalize.apply(x, weight, bias, mean, variance, self.eps, sets)
        return made.to(dtype), mean, variance


class SplitBatchNorm(_SplitNorm):
    """Batch norm; in evaluation as ever."""

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        sets = self.sets(x, rows, None)
        made, mean, variance = self.normalized(x, sets)
        if self.training and self.running_mean is not None:
            self._follow(mean[0], variance[0], sets.num_elements(*x.shape[:2]))
        return made

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor, num_elements: int) -> None:
        if num_elements < 2:
            raise UnsupportedModelError(f"{self.path}: one value per channel has no variance")
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / self.num_batches_tracked.to(mean.dtype)
        unbiased = variance * (num_elements / (num_elements - 1))
        self.running_mean.add_((mean - self.running_mean) * share)
        self.running_var.add_((unbiased - self.running_var) * share)


class SplitGroupNorm(_SplitNorm):
    """Group norm."""

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        return self.normalized(x, self.sets(x, rows, self.num_groups))[0]


class SplitInstanceNorm(_SplitNorm):
    """Instance norm without running statistics."""

    def check(self) -> None:
        """As of every layer."""
        if self.track_running_stats:
            raise UnsupportedModelError("track_running_stats=True of instance norm")

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """As of every layer."""
        return self.normalized(x, self.sets(x, rows, x.shape[1]))[0]
