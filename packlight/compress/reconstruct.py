"""ThiNet: which inputs of a layer are needed to compute what it computes (Luo, Wu, Lin 2017).

arXiv 1707.06342, algorithm 1. A sum over input channels is sampled at random outputs; channels are
dropped greedily, each time the one without which the dropped ones' sum stays nearest to zero
(equation 6); what is left is scaled to fit best (equation 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from packlight.compress.errors import CalibrationError, CompressionError
from packlight.compress.packages import torch_pruning
from packlight.errors import OptionError
from packlight.torch_internals.modules import padding_of

_SUPPORTED = (nn.Linear, nn.Conv2d)


@torch.no_grad()
def remove_inputs(
    model: nn.Module,
    name: str,
    num_kept: int,
    batches: Iterable[Any],
    *,
    samples_per_batch: int = 1000,
    seed: int = 0,
) -> float:
    """Remove input channels of a layer, and what makes them, so that its outputs change least.

    Args:
        model: changed: the layer has `num_kept` inputs, and the layers before as many outputs.
        name: of a linear layer or a 2-d convolution without groups.
        num_kept: input channels that stay.
        batches: of calibration data: the model's inputs, a tensor or a tuple of them.
        samples_per_batch: outputs at which sums are compared.
        seed: of where they are.

    Returns:
        The squared error of the reconstruction at the samples over their sum of squares.

    Raises:
        CompressionError: no such layer, or its inputs are not one channel each.
        OptionError: `num_kept` is out of range.
        CalibrationError: no batches.
        MissingExtraError: torch-pruning is not installed.
    """
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, _SUPPORTED) or getattr(layer, "groups", 1) != 1:
        raise CompressionError(name, "is no linear layer and no 2-d convolution without groups")
    num_inputs = layer.weight.shape[1]
    if not 0 < num_kept <= num_inputs:
        raise OptionError(f"num_kept={num_kept}; {name!r} has {num_inputs} input channels")
    parts, example = _sampled(model, layer, batches, samples_per_batch, seed)
    kept, scale, error = choose_inputs(parts, num_kept)
    tp = torch_pruning()
    graph = tp.DependencyGraph()
    was_training = model.training
    with torch.enable_grad():
        graph.build_dependency(model.eval(), example_inputs=example, verbose=False)
    model.train(was_training)
    remove = (
        tp.prune_linear_in_channels if isinstance(layer, nn.Linear) else tp.prune_conv_in_channels
    )
    trailing = [1] * (layer.weight.dim() - 2)
    removed = sorted(set(range(num_inputs)) - set(kept.tolist()))
    if removed:
        group = graph.get_pruning_group(layer, remove, removed)
        if any(len(item.idxs) != len(removed) for item in group):
            raise CompressionError(
                name, "has inputs of which several come from one channel",
                "remove channels by magnitude: packlight.compress.remove_channels",
            )  # fmt: skip
        layer.weight[:, kept] *= scale.to(layer.weight.dtype).view(1, -1, *trailing)
        group.prune()
    return error


def choose_inputs(
    parts: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the channels that reconstruct a sum, their scales, and the relative squared error.

    Args:
        parts: float [M, C]: what each channel adds to each of M outputs.
        num_kept: how many channels to keep.

    >>> parts = torch.tensor([[1.0, 0.1, 2.0], [2.0, -0.1, 4.0], [0.5, 0.0, 1.0]])
    >>> kept, scale, error = choose_inputs(parts, 1)
    >>> kept.tolist(), round(float(scale), 1), error < 0.01
    ([2], 1.5, True)
    """
    parts = parts.double()
    wanted = parts.sum(dim=1)
    squares = parts.square().sum(dim=0)
    dropped_sum = torch.zeros_like(wanted)
    is_kept = torch.ones(parts.shape[1], dtype=torch.bool)
    for _ in range(parts.shape[1] - num_kept):
        growth = 2 * (dropped_sum @ parts) + squares
        channel = int(growth.masked_fill(~is_kept, torch.inf).argmin())
        is_kept[channel] = False
        dropped_sum += parts[:, channel]
    kept = is_kept.nonzero()[:, 0]
    scale = torch.linalg.lstsq(parts[:, kept], wanted[:, None], driver="gelsd").solution[:, 0]
    error = (parts[:, kept] @ scale - wanted).square().sum()
    return kept, scale, float(error / wanted.square().sum().clamp_min(1e-30))


def _sampled(
    model: nn.Module, layer: Any, batches: Iterable[Any], num_samples: int, seed: int
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Return what each input channel adds to random outputs of a layer, and one batch."""
    generator = torch.Generator().manual_seed(seed)
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    parts, example = [], None
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            example = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            seen.clear()
            model(*example)
            for inputs in seen:
                parts.append(_parts(layer, inputs, num_samples, generator))
    finally:
        hook.remove()
        model.train(was_training)
    if example is None:
        raise CalibrationError("remove_inputs")
    if not parts:
        raise CompressionError(type(layer).__name__, "does not run in the model's forward")
    return torch.cat(parts), example


def _parts(
    layer: Any, inputs: torch.Tensor, num_samples: int, generator: torch.Generator
) -> torch.Tensor:
    def drawn(size: int) -> torch.Tensor:
        return torch.randint(size, (num_samples,), generator=generator)

    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[drawn(len(rows))] * layer.weight[drawn(layer.out_features)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, padding_of(layer), mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    num_images, _, num_places = patches.shape
    # [samples, channels, taps]
    taps = patches[drawn(num_images), :, drawn(num_places)].view(
        num_samples, layer.in_channels, -1
    )
    weights = layer.weight[drawn(layer.out_channels)].flatten(2)
    parts: torch.Tensor = (taps * weights).sum(dim=2)
    return parts
