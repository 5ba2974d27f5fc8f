"""Where activations and weights of a model on a rank's rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from packlight.convolution.axis import Axis, Rows


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer's input, result and weights lie.

    Attributes:
        path: of the layer.
        kind: its class, as it was.
        shape: of its input, all ranks together.
        out_shape: of its result.
        is_cut: whether the input is cut.
        is_cut_after: whether the result is.
        rows: what it does along each axis; none where the input is whole.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    is_cut: bool
    is_cut_after: bool
    rows: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class SplitModel:
    """A model on this rank's rows.

    Attributes:
        model: it, changed in place.
        axes: the dimensions that are cut.
        layers: where everything lies, for each example, in the order in which layers run.
        is_cut_after: whether the model's results are this rank's rows, too.
    """

    model: nn.Module
    axes: tuple[Axis, ...]
    layers: tuple[LayerPlace, ...]
    is_cut_after: bool

    def part(self, whole: torch.Tensor, channels: bool = True) -> torch.Tensor:
        """Return this rank's rows of samples.

        Args:
            whole: (batch, channels, *spatial), or labels (batch, *spatial).
            channels: whether there are channels.
        """
        for axis in self.axes:
            dim = axis.dim if channels else axis.dim - 1
            start, end = axis.bounds(whole.shape[dim])
            whole = whole.narrow(dim, start, end - start)
        return whole.clone(memory_format=torch.contiguous_format)

    def weight(self, *sizes: int) -> float:
        """Return by what to multiply a mean over this rank's rows; 1 where all have as many.

        The mean over ranks is then that of all rows.

        Args:
            sizes: of the dimensions that are cut, on all ranks together.
        """
        share = 1.0
        for axis, size in zip(self.axes, sizes, strict=True):
            share *= axis.num_rows(size) * axis.peers.size / size
        return share

    def describe(self) -> str:
        """Return a table of where each layer's input, result and weights lie."""
        names = " x ".join(f"{axis.name}={axis.peers.size}" for axis in self.axes)
        lines = [f"dimensions {', '.join(str(a.dim) for a in self.axes)} over {names}"]
        width = max([len(layer.path) for layer in self.layers], default=0)
        for layer in self.layers:
            rows = [
                f"{axis.dim}: {_words(each, axis)}"
                for axis, each in zip(self.axes, layer.rows, strict=False)
            ]
            lines.append(
                f"{layer.path:<{width}}  {layer.kind:<18} {_shape(layer.shape, layer.is_cut)} -> "
                f"{_shape(layer.out_shape, layer.is_cut_after)}  {'; '.join(rows)}".rstrip()
            )
        lines.append("weights are whole on all ranks; their gradients are the mean of all ranks'")
        return "\n".join(lines)

    def halo_rows(self) -> list[tuple[str, int, int]]:
        """Return what this rank gets: (path, dimension, rows), where any come from others."""
        return [
            (layer.path, axis.dim, each.map.num_received(axis.peers.rank))
            for layer in self.layers
            for axis, each in zip(self.axes, layer.rows, strict=False)
            if each.map.most_received
        ]


def _shape(shape: Sequence[int], is_cut: bool) -> str:
    return f"({', '.join(map(str, shape[1:]))}) {'cut' if is_cut else 'whole'}"


def _words(rows: Rows, axis: Axis) -> str:
    count = rows.map.most_received
    return f"{count} rows from others" if count else "own rows"
