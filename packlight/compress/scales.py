"""Sparse structure selection: a factor for each channel, pushed to exactly zero in training.

Huang, Wang 2018, arXiv 1707.01213: the factors' L1 norm is minimised by a proximal step after each
step of the optimizer, so that they reach zero and not only its neighbourhood. Channels whose factor
is zero are then removed by `remove_dead_channels`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from packlight.compress.errors import CompressionError
from packlight.compress.layers import Place, attach, detach


class ScaleSelection:
    """Gives each output channel of some layers a factor that is trained and can become zero.

        selection = ScaleSelection(model, ["features.0", "features.3"])
        optimizer = ...                              # of model.parameters(), made now
        ...
        optimizer.step()
        selection.shrink(learning_rate * strength)   # after each step
        ...
        selection.finish()
        remove_dead_channels(model, example_inputs)

    Args:
        model: changed: weight and bias of the layers are multiplied by factors.
        names: of layers. Where batch norm follows a convolution, name the batch norm: its weight
            and bias are what makes a channel zero.

    Raises:
        CompressionError: no such layer, or one without a weight.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> selection = ScaleSelection(model, ["0"])
    >>> selection.shrink(0.25)
    >>> selection.factors()["0"].tolist()
    [0.75, 0.75, 0.75]
    >>> selection.shrink(1.0)
    >>> selection.finish()
    >>> model[0].weight.abs().sum().item(), model[0].bias.abs().sum().item()
    (0.0, 0.0)
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self._places: list[Place] = []
        self._scales: dict[str, _Scale] = {}
        for name in names:
            layer = modules.get(name)
            weight = getattr(layer, "weight", None)
            if layer is None or weight is None or parametrize.is_parametrized(layer):
                raise CompressionError(name, "is no layer with a plain weight")
            self._scales[name] = _Scale(weight)
            self._places += [
                Place(name, layer, leaf, tuple(layer._parameters))
                for leaf in ("weight", "bias")
                if getattr(layer, leaf, None) is not None
            ]
        if not self._places:
            raise CompressionError(type(model).__name__, "got no names of layers to select from")
        for place in self._places:
            attach(place, self._scales[place.name])

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """Move all factors towards zero by an amount, and no further: the proximal step of L1."""
        for scale in self._scales.values():
            factor = scale.factor
            factor.copy_(factor.sign() * (factor.abs() - amount).clamp_min(0))

    def factors(self) -> dict[str, torch.Tensor]:
        """Return each layer's factors."""
        return {name: scale.factor.detach().clone() for name, scale in self._scales.items()}

    def finish(self) -> None:
        """Multiply the factors into the weights; the model is plain again."""
        for place in self._places:
            detach(place)


class _Scale(nn.Module):
    """A tensor times a factor for each of its first dim.

    Attributes:
        factor: trained.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(weight.shape[0], dtype=weight.dtype))
        self.factor.data = self.factor.data.to(weight.device)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.factor.view(-1, *[1] * (tensor.dim() - 1))
