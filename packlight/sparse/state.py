"""Optimizer state that follows its values where a pattern changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from packlight.errors import SparsityError
from packlight.sparse.weight import rearranged

_ABLE = (
    "SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, RMSprop, Rprop and ASGD of "
    "torch.optim, and those of packlight.optim"
)

# They look at a weight's rows and columns, or at all parameters together.
_UNABLE = ("Adafactor", "Muon", "LBFGS", "SparseAdam", "Shampoo", "SOAP")


def check_movable(
    name: str, optimizer: torch.optim.Optimizer | None, values: torch.Tensor
) -> None:
    """Refuse an optimizer whose state is not made of numbers for each value.

    Raises:
        SparsityError: it names what cannot follow, and optimizers that can.
    """
    if optimizer is None or _moves_itself(optimizer):
        return
    kind = type(optimizer).__name__
    if kind in _UNABLE:
        raise SparsityError(
            f"{kind} cannot hold the state of sparse weights ({name!r}): its state belongs to rows "
            f"and columns, or to all parameters together\nhint: {_ABLE} can"
        )
    for key, value in _state(optimizer, values).items():
        if isinstance(value, torch.Tensor) and value.shape != values.shape and value.numel() != 1:
            raise SparsityError(
                f"{kind} keeps {key!r} of shape {tuple(value.shape)} for the {len(values)} values "
                f"of {name!r}; only what has a number for each value can follow them\n"
                f"hint: {_ABLE} can"
            )


def move_state(
    optimizer: torch.optim.Optimizer, values: torch.Tensor, source: torch.Tensor
) -> None:
    """Give each new value the state of the one that it was; zero to those that are new.

    Args:
        optimizer: see `check_movable`.
        values: the parameter, still in the old order.
        source: for each new value which old one it is, -1 for none.
    """
    if _moves_itself(optimizer):
        optimizer.rearrange_state(values, source)  # type: ignore[attr-defined]
        return
    state = _state(optimizer, values)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == values.shape and value.ndim:
            new = rearranged(value, source)
            if new.shape == value.shape:
                value.copy_(new)  # keeps its place in memory
            else:
                state[key] = new


def state_bytes(optimizer: torch.optim.Optimizer | None, values: torch.Tensor) -> int:
    """Return the size of what an optimizer keeps for a parameter."""
    if optimizer is None:
        return 0
    state = _state(optimizer, values)
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def _moves_itself(optimizer: torch.optim.Optimizer) -> bool:
    return callable(getattr(optimizer, "rearrange_state", None))


def _state(optimizer: torch.optim.Optimizer, values: torch.Tensor) -> Any:
    state: Mapping[Any, Any] = optimizer.state
    return state[values] if values in state else {}
