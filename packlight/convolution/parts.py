"""Layers of which a rank has a part: some filters, or the weights for some channels.

As for linear layers in Shoeybi et al. 2019, arXiv 1909.08053, with

    filters    identity forward, sums backward         (all ranks have the input)
    channels   sums forward, identity backward         (all ranks have the result)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from packlight.convolution.axis import Axis
from packlight.convolution.layers import convolved, pads_of, transposed
from packlight.ranks.collectives import all_gather, all_reduce
from packlight.ranks.exchange import own_part

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Filters:
    """Each rank has as many filters (output channels) of a layer.

    Attributes:
        gather: whether all ranks then get all channels of the result.
    """

    gather: bool = False


@dataclass(frozen=True)
class Channels:
    """Each rank has a layer's weights for as many input channels; results are added up."""


Style = Filters | Channels


class _SumBackward(torch.autograd.Function):
    """What all ranks have; what their parts say of it is added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str) -> torch.Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return all_reduce(gradient, "sum", ctx.group_name), None


class _SumForward(torch.autograd.Function):
    """The sum of what ranks have; each has the whole loss, so its gradient is whole."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str) -> Any:
        return all_reduce(x, "sum", group_name)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class _Gather(torch.autograd.Function):
    """All channels, of which each rank has some."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        rows = x.movedim(1, 0).contiguous()
        whole: torch.Tensor = all_gather(rows, axis.peers.size, axis.group_name)
        return whole.movedim(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return own_part(gradient, 1, ctx.axis.peers.size, ctx.axis.group_name), None


class PartLayer(nn.Module):
    """A layer of which this rank has a part; mixed into the class of the layer that it was.

    Attributes:
        axis: the ranks.
        style: how it is split; None for one that works on the channels that it gets.
        parts: parameters and buffers that are parts: their dimension by their name.
        takes_whole: whether its input is whole on all ranks.
        narrows: whether it then works on this rank's channels of it.
    """

    axis: Axis
    style: Style | None
    parts: dict[str, int]
    takes_whole: bool
    narrows: bool

    def split(self) -> None:
        """Make parameters and buffers this rank's parts."""
        for name, dim in self.parts.items():
            whole = getattr(self, name)
            part = own_part(whole.detach(), dim, self.axis.peers.size, self.axis.group_name)
            if isinstance(whole, nn.Parameter):
                part = nn.Parameter(part, requires_grad=whole.requires_grad)
            setattr(self, name, part)

    @property
    def packlight_parts(self) -> list[nn.Parameter]:
        """Parameters whose values are each rank's own (`packlight.ranks.tensor`)."""
        found = [getattr(self, name) for name in self.parts]
        return [each for each in found if isinstance(each, nn.Parameter)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the result, or all of it."""
        name = self.axis.group_name
        if self.takes_whole and self.style is not None:
            x = _SumBackward.apply(x, name)
            if self.narrows:
                x = own_part(x, 1, self.axis.peers.size, name)
        if not isinstance(self.style, Channels):
            made: torch.Tensor = super().forward(x)
            if isinstance(self.style, Filters) and self.style.gather:
                made = _Gather.apply(made, self.axis)
            return made
        made = _SumForward.apply(_without_bias(self, x), name)
        if self.bias is not None:
            bias: Any = self.bias
            made = made + bias.view(-1, *[1] * (made.ndim - 2))
        return made


def _without_bias(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight)
    if isinstance(layer, _TRANSPOSED):
        assert not isinstance(layer.padding, str), "these are numbers"
        return transposed(layer, x, layer.padding, layer.output_padding, None)
    return convolved(layer, x, pads_of(layer), None)
