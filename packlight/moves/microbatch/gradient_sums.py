"""Gradients of a loss, each folded to a few numbers as soon as it is complete, to be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

# So many numbers of each parameter are compared. A prime: rows and columns of a larger gradient
# fall on different places.
FOLDED_ELEMENTS = 1021

Folded = dict[str, torch.Tensor]


def folded_gradients(model: nn.Module, loss: torch.Tensor, weight: float) -> Folded:
    """Return the gradient of each parameter that has one, folded: name -> vector in float64.

    Folding is linear: what holds for gradients that add up, holds for them folded. Gradients are in
    memory one at a time; those that parameters hold already are there again afterwards.

    Args:
        model: the loss's.
        loss: 0-dimensional.
        weight: what the backward starts from.
    """
    folded: Folded = {}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.grad for name, p in named.items()}
    handles = []

    def take(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        folded[name], parameter.grad = _folded(parameter.grad.detach()), None

    try:
        for name, parameter in named.items():
            parameter.grad = None
            handles.append(
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
            )
        if loss.requires_grad:
            loss.backward(torch.full_like(loss, weight))
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in named.items():
            parameter.grad = held[name]
    return folded


def largest_difference(
    whole: Folded, parts: Sequence[Folded], tolerance: float
) -> tuple[str, float] | None:
    """Return the parameter in which parts add up to something else than the whole, and how much.

    Args:
        whole: folded gradients.
        parts: those that should add up to them.
        tolerance: of a parameter's largest number; a hundredth of it of the largest of all, for
            gradients that are nothing but rounding.

    Returns:
        (name, relative difference), None where all agree.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    sizes, differences = {}, {}
    for name in whole.keys() | {name for part in parts for name in part}:
        expected, pieces = whole.get(name, zero), [part[name] for part in parts if name in part]
        # Where the whole's gradient is not finite, there is nothing to keep.
        compared = expected.isfinite()
        difference = (expected - sum(pieces, zero)).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        differences[name] = float(torch.where(compared, difference, 0.0).sum())
        sizes[name] = max(float(t[t.isfinite()].abs().sum()) for t in (expected, *pieces))
    largest = max(sizes.values(), default=0.0)
    off = {
        name: difference / (tolerance * (sizes[name] + largest / 100))
        for name, difference in differences.items()
        if difference > 0
    }
    worst = max(off, key=off.__getitem__, default=None)
    return None if worst is None or off[worst] <= 1 else (worst, off[worst] * tolerance)


def _folded(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    flat = gradient.reshape(-1)
    num_rows = flat.numel() // FOLDED_ELEMENTS
    if num_rows == 0:
        return flat.to("cpu", torch.float64)
    rest = flat[num_rows * FOLDED_ELEMENTS :]
    dtype = torch.promote_types(flat.dtype, torch.float32)
    folded = flat[: num_rows * FOLDED_ELEMENTS].view(num_rows, -1).sum(0, dtype=dtype)
    folded[: rest.numel()] += rest
    return folded.to("cpu", torch.float64)
