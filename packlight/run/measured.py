"""A training step measured while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from packlight.capture.returned import loss_of
from packlight.costs.peak import measure_peak
from packlight.step import StepMemory
from packlight.updates.accounting import batch_bytes, tensors_bytes


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One training step that was measured while it ran.

    Attributes:
        loss: the detached loss.
        extras: what the loss function returns beside it.
        peak_bytes: the whole step's peak: what was in memory before it and what it added.
    """

    loss: torch.Tensor
    peak_bytes: int
    extras: tuple[Any, ...] = ()


def measured_step(
    step: Callable[[], Any],
    memory: StepMemory,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    is_on_disk: Callable[[torch.Tensor], bool],
    device: torch.device,
) -> MeasuredStep:
    """Run a step and measure it.

    Args:
        step: trains it and returns what the loss function does.
        memory: what is there before it, but for gradients and the state that the optimizer has.
        batch: that it trains on.
        optimizer: that it steps.
        is_on_disk: whether a state takes no memory.
        device: whose allocator is watched.
    """
    before = memory.parameter_bytes + memory.state_bytes + memory.beside_bytes + batch_bytes(batch)
    before += tensors_bytes(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and not is_on_disk(value)
    )
    held = (p.grad for group in optimizer.param_groups for p in group["params"])
    before += tensors_bytes(gradient for gradient in held if gradient is not None)
    peak = measure_peak(step, device)
    returned = peak.result
    extras = tuple(returned[1:]) if isinstance(returned, (tuple, list)) else ()
    return MeasuredStep(loss_of(returned), before + peak.peak_bytes, extras)
