"""Random operations that run again: the generator's state before the first run is replayed."""

from __future__ import annotations

from typing import Any

import torch


def generator_state(device: torch.device) -> torch.Tensor:
    """Return a copy of the default generator's state (uint8, on the host)."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def replay(
    state: torch.Tensor, device: torch.device, target: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Run a random operation as it ran when `state` was taken; leave the generator as it was.

    Args:
        state: from `generator_state`.
        device: whose default generator the operation draws from.
        target: the operator.
        *args: its arguments.
        **kwargs: its keyword arguments, whose names may be those above.
    """
    now = generator_state(device)
    set_generator_state(state, device)
    try:
        return target(*args, **kwargs)
    finally:
        set_generator_state(now, device)


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Set a device's default generator back to a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
