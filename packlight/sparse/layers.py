"""Layers with a sparse weight, each in the place of PyTorch's layer of the same arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from packlight.sparse import ops
from packlight.sparse.sampling import sample_distinct
from packlight.sparse.weight import SparseWeight


class SparseLayer(nn.Module):
    """What the layers share. They are made with their weight, or of a dense layer.

    Attributes:
        weight: values and index; may be shared with another layer.
        bias: dense, or None.
        arguments: of PyTorch's layer that this one stands for.

    Args:
        *arguments: of PyTorch's layer.
        density: share of the weight's elements that are stored, at random places.
        **keywords: of PyTorch's layer.
    """

    dense_type: type[nn.Module]
    kept: tuple[str, ...] = ()
    weight: SparseWeight
    bias: nn.Parameter | None

    def __init__(self, *arguments: Any, density: float, **keywords: Any) -> None:
        super().__init__()
        dtype = keywords.pop("dtype", None) or torch.get_default_dtype()
        dense: Any = self.dense_type(*arguments, **keywords, device="meta", dtype=dtype)
        shape = dense.weight.shape
        count = max(1, round(density * shape.numel()))
        values = torch.empty(count, dtype=dtype)
        bound = shape[1:].numel() ** -0.5
        if isinstance(dense, nn.Embedding):
            nn.init.normal_(values)
        else:  # as PyTorch initialises the dense layer
            nn.init.uniform_(values, -bound, bound)
        positions = sample_distinct(count, shape.numel())
        bias = getattr(dense, "bias", None)
        if isinstance(bias, torch.Tensor):
            bias = nn.Parameter(torch.empty(bias.shape, dtype=dtype).uniform_(-bound, bound))
        self._take(dense, SparseWeight(values, positions, shape), bias)

    @classmethod
    def of_dense(cls, dense: nn.Module, weight: SparseWeight) -> SparseLayer:
        """Return a layer with a dense one's settings and bias, and this weight."""
        layer: SparseLayer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(dense, weight, getattr(dense, "bias", None))
        layer.train(dense.training)
        return layer

    def _take(self, dense: nn.Module, weight: SparseWeight, bias: Any) -> None:
        for name in self.kept:
            setattr(self, name, getattr(dense, name))
        self.weight, self.bias = weight, bias

    def to_dense(self) -> nn.Module:
        """Return PyTorch's layer with the same weight, zeros written out; it shares the bias."""
        dense = self._dense(device="meta", dtype=self.weight.dtype)
        dense.weight = nn.Parameter(self.weight.dense())
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def _dense(self, **made: Any) -> nn.Module:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the settings."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.kept)


class SparseLinear(SparseLayer):
    """`torch.nn.Linear` with a sparse weight: (*, in_features) to (*, out_features).

    >>> layer = SparseLinear(1000, 10, density=0.1)
    >>> layer.weight.num_nonzeros, layer(torch.ones(4, 1000)).shape
    (1000, torch.Size([4, 10]))
    """

    dense_type = nn.Linear
    kept = ("in_features", "out_features")
    in_features: int
    out_features: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, of x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        weight = self.weight
        shape = list(weight.shape)
        out: torch.Tensor = ops.product(
            rows, weight.values, weight.index, self.bias, shape, [], [], [], 1
        )
        return out.view(*x.shape[:-1], shape[0])

    def _dense(self, **made: Any) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **made)


class _SparseConvolution(SparseLayer):
    kept = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _take(self, dense: nn.Module, weight: SparseWeight, bias: Any) -> None:
        super()._take(dense, weight, bias)
        # (left, right) of each dimension, the last one first, as `nn.functional.pad` wants it.
        sides = list(dense._reversed_padding_repeated_twice)  # type: ignore[arg-type]
        is_even = all(a == b for a, b in zip(sides[::2], sides[1::2], strict=True))
        zeros = self.padding_mode == "zeros" and is_even
        self._padded = None if zeros else sides
        self._padding = sides[::-2] if zeros else [0] * len(self.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of (n, in_channels, *size), of x's dtype."""
        if x.ndim == len(self.kernel_size) + 1:
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        if self._padded is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, self._padded, mode=mode)
        weight = self.weight
        out: torch.Tensor = ops.product(
            x, weight.values, weight.index, self.bias, list(weight.shape), list(self.stride),
            self._padding, list(self.dilation), self.groups,
        )
        return out

    def _dense(self, **made: Any) -> nn.Module:
        settings = {name: getattr(self, name) for name in self.kept}
        return self.dense_type(**settings, bias=self.bias is not None, **made)


class SparseConv1d(_SparseConvolution):
    """`torch.nn.Conv1d` with a sparse weight: (n, in, length) to (n, out, length')."""

    dense_type = nn.Conv1d


class SparseConv2d(_SparseConvolution):
    """`torch.nn.Conv2d` with a sparse weight: (n, in, high, wide) to (n, out, high', wide')."""

    dense_type = nn.Conv2d


class SparseEmbedding(SparseLayer):
    """`torch.nn.Embedding` with a sparse weight: numbers (*) to vectors (*, embedding_dim)."""

    dense_type = nn.Embedding
    kept = ("num_embeddings", "embedding_dim", "padding_idx")
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of the weight, zeros included."""
        weight, padding = self.weight, -1 if self.padding_idx is None else self.padding_idx
        out: torch.Tensor = ops.look_up(
            rows, weight.values, weight.index, list(weight.shape), padding
        )
        return out

    def _dense(self, **made: Any) -> nn.Module:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **made)


LAYERS: dict[type[nn.Module], type[SparseLayer]] = {
    layer.dense_type: layer for layer in (SparseLinear, SparseConv1d, SparseConv2d, SparseEmbedding)
}
