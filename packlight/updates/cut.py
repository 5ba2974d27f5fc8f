"""Optimizer states that were whole when their parameters came to lie in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from packlight.errors import UnsupportedModelError
from packlight.ranks.pieces import Pieces
from packlight.updates.several import parts_of


def cut_states(
    optimizer: torch.optim.Optimizer | None, pieces_of: Mapping[nn.Parameter, Pieces], rank: int
) -> None:
    """Have each state of a parameter in pieces be this rank's part of it.

    Args:
        optimizer: which may have been stepped, or loaded, before.
        pieces_of: parameters in pieces.
        rank: this one.

    Raises:
        UnsupportedModelError: a state lies in no way that is known.
    """
    for part in parts_of(optimizer):
        for parameter, pieces in pieces_of.items():
            state = part.state.get(parameter)
            if not state or pieces.num_rows(rank) == pieces.shape[0]:
                continue
            if pieces.num_rows(rank) == 0:
                del part.state[parameter]
                continue
            for name, value in state.items():
                state[name] = _own(name, value, pieces, rank)


def _own(name: str, value: Any, pieces: Pieces, rank: int) -> Any:
    first, end = pieces.rows[rank]
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if tuple(value.shape) == pieces.shape:
        return value[first:end].clone()
    raise UnsupportedModelError(
        f"optimizer state {name!r} of shape {tuple(value.shape)} cannot be cut into pieces as a "
        f"parameter of shape {pieces.shape} is\nhint: fit before the first step, or step.load()"
    )
