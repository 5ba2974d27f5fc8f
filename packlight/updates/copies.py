"""One parameter stepped whole or in slices, and copies of it that show what a step holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from packlight.updates.accounting import TwoSteps, measure_two_steps
from packlight.updates.observe import state_form
from packlight.updates.slices import like_eager, step_in_slices
from packlight.updates.twin import Group, stand_in, step_alone

# Parameters, gradients and states in measurements: any number that takes no special path.
_FILLER = 0.01


@dataclass(frozen=True, slots=True)
class Slices:
    """How a parameter is stepped slice by slice.

    Attributes:
        first_rows: of a slice in the step that makes the state.
        rows: of a slice in later steps.
        split_names: states that are sliced, too.
    """

    first_rows: int
    rows: int
    split_names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a parameter that was stepped twice.

    Attributes:
        bytes: what that allocated.
        state_form: of the state that it made.
        step: steps it once more.
    """

    bytes: TwoSteps
    state_form: frozenset[tuple[str, Any, bool]]
    step: Callable[[], None]


def step_one(
    optimizer: torch.optim.Optimizer,
    group: Group,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    states: Any,
    slices: Slices | None,
) -> None:
    """Step one parameter, in slices where they are given (see `twin.step_alone`)."""
    if slices is None:
        step_alone(optimizer, group, parameter, like_eager(gradient, parameter), states)
    else:
        rows = slices.rows if states.get(parameter) else slices.first_rows
        step_in_slices(optimizer, group, parameter, gradient, states, rows, slices.split_names)


def measure_copy(
    optimizer: torch.optim.Optimizer,
    group: Group,
    parameter: torch.Tensor,
    gradient_stride: tuple[int, ...],
    slices: Slices | None,
) -> Copy:
    """Return what two steps of a copy of a parameter show."""
    copy = torch.nn.Parameter(_filled(parameter, parameter.stride()))
    gradient = _filled(parameter, gradient_stride)
    twin = stand_in(optimizer, [group], [[copy]])

    def step() -> None:
        step_one(twin, twin.param_groups[0], copy, gradient, twin.state, slices)

    seen = measure_two_steps(step, twin.state, parameter.device)
    return Copy(seen, state_form(twin.state.get(copy, {}), copy.shape), step)


def _filled(like: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    last = sum((size - 1) * step for size, step in zip(like.shape, stride, strict=True))
    num_elements = last + 1 if like.numel() else 0
    values = torch.full((num_elements,), _FILLER, dtype=like.dtype, device=like.device)
    return values.as_strided(like.shape, stride)
