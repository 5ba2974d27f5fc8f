"""Weights with noise that is trained: those that stand any amount of it are pruned.

Sparse variational dropout (Molchanov, Ashukha, Vetrov 2017, arXiv 1701.05369): each weight is a
normal distribution of mean w and variance s^2; the loss is that of noisy weights plus the
divergence from a prior under which the logarithm of a weight is uniform. Where log(s^2 / w^2)
exceeds 3, noise is all there is. Noise is drawn for each output rather than each weight (local
reparameterization).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from packlight.compress.errors import CompressionError
from packlight.torch_internals.modules import convolved

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695  # equation 14
_LEAST_VARIANCE = 1e-8


class VariationalPruner:
    """Trains a model's linear layers and convolutions with noise, and prunes by it.

        pruner = VariationalPruner(model)
        optimizer = ...                          # of model.parameters(), made now
        ...
        loss = loss_fn(model, batch) + weight * pruner.divergence() / num_examples
        ...
        pruner.finish()                          # a plain model, with zeros

    Let `weight` rise from 0 to 1 over the first part of the training. In `model.eval()` layers
    compute with the means, those to be pruned as zeros.

    Args:
        model: changed: its linear layers and convolutions have a further parameter, `log_variance`,
            of their weight's shape.
        initial_log_variance: of all weights.
        threshold: weights with a larger log(s^2 / w^2) are pruned.

    Raises:
        CompressionError: the model has no linear layer and no convolution.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pruner = VariationalPruner(model)
    >>> model(torch.ones(5, 4)).shape, pruner.density
    (torch.Size([5, 2]), 1.0)
    >>> pruner.finish()
    >>> sorted(model.state_dict())
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(
        self, model: nn.Module, *, initial_log_variance: float = -10.0, threshold: float = 3.0
    ) -> None:
        self.threshold = threshold
        self._layers = [module for module in model.modules() if type(module) in _NOISY]
        if not self._layers:
            raise CompressionError(
                type(model).__name__, "has no linear layer and no convolution to put noise into",
                "prune by magnitude: packlight.compress.Pruner",
            )  # fmt: skip
        self._plain_types = [type(layer) for layer in self._layers]
        for layer in self._layers:
            log_variance = torch.full_like(layer.weight, initial_log_variance)  # type: ignore
            layer.register_parameter("log_variance", nn.Parameter(log_variance))
            layer.threshold = threshold  # type: ignore[assignment]
            layer.__class__ = _NOISY[type(layer)]

    def divergence(self) -> torch.Tensor:
        """Return the divergence from the prior, summed over all weights (equation 14)."""
        terms = []
        for layer in self._layers:
            log_ratio = _log_ratio(layer)
            terms.append(
                (_K1 - _K1 * torch.sigmoid(_K2 + _K3 * log_ratio) + 0.5 * F.softplus(-log_ratio))
                .sum()
            )  # fmt: skip
        return torch.stack(terms).sum()

    @property
    def density(self) -> float:
        """The share of weights that would be kept now."""
        kept = sum(int((_log_ratio(layer) <= self.threshold).sum()) for layer in self._layers)
        return kept / sum(layer.weight.numel() for layer in self._layers)  # type: ignore

    @torch.no_grad()
    def finish(self) -> None:
        """Write zeros where noise is all there is, and take the noise away: a plain model again."""
        for layer, plain in zip(self._layers, self._plain_types, strict=True):
            layer.weight[_log_ratio(layer) > self.threshold] = 0  # type: ignore[operator]
            del layer.log_variance, layer.threshold
            layer.__class__ = plain


def _log_ratio(layer: nn.Module) -> torch.Tensor:
    """Return log(s^2 / w^2)."""
    squares = layer.weight.square() + _LEAST_VARIANCE  # type: ignore[operator]
    log_ratio: torch.Tensor = layer.log_variance - squares.log()  # type: ignore[operator]
    return log_ratio.clamp(-10, 10)


class _Noise(nn.Module):
    """What noisy layers share."""

    weight: torch.Tensor
    bias: Any
    log_variance: torch.Tensor
    threshold: float

    def _apply_weight(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            kept = self.weight.masked_fill(_log_ratio(self) > self.threshold, 0)
            return self._apply_weight(inputs, kept, self.bias)
        mean = self._apply_weight(inputs, self.weight, self.bias)
        variance = self._apply_weight(inputs.square(), self.log_variance.exp(), None)
        return mean + (variance + _LEAST_VARIANCE).sqrt() * torch.randn_like(mean)


class _NoisyLinear(_Noise, nn.Linear):
    def _apply_weight(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return F.linear(inputs, weight, bias)


class _NoisyConv(_Noise):
    def _apply_weight(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return convolved(self, inputs, weight, bias)


class _NoisyConv1d(_NoisyConv, nn.Conv1d):
    pass


class _NoisyConv2d(_NoisyConv, nn.Conv2d):
    pass


class _NoisyConv3d(_NoisyConv, nn.Conv3d):
    pass


_NOISY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _NoisyLinear,
    nn.Conv1d: _NoisyConv1d,
    nn.Conv2d: _NoisyConv2d,
    nn.Conv3d: _NoisyConv3d,
}
