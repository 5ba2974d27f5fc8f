"""What torch keeps of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def hooks_of_all_modules() -> list[int]:
    """Return the numbers of the hooks that torch runs for every module, new ones for new hooks.

    Relied upon: torch keeps them in dictionaries of the module, by numbers that it counts on.
    """
    kept = nn.modules.module
    return [
        *kept._global_forward_pre_hooks, *kept._global_forward_hooks,
        *kept._global_backward_pre_hooks, *kept._global_backward_hooks,
    ]


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile(model)` returns; another model as it is."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


# The classes that all convolutions, and all batch norms, are of.
CONVOLUTION = nn.modules.conv._ConvNd
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def padding_of(layer: nn.Module) -> list[int]:
    """Return a convolution's padding as `torch.nn.functional.pad` takes it.

    Relied upon: it is worked out when the layer is made, for "same" and "valid", too.
    """
    padding: Any = layer._reversed_padding_repeated_twice
    return list(padding)


def convolved(
    layer: nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what a convolution makes of its inputs with another weight and bias.

    Relied upon: `_conv_forward(inputs, weight, bias)`, whatever its padding mode.
    """
    found: torch.Tensor = layer._conv_forward(inputs, weight, bias)  # type: ignore[operator]
    return found
