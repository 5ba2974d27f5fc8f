"""One parameter stepped whole or in slices, and copies of it that show what a step holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from packlight.updates.accounting import TwoSteps, measure_two_steps
from packlight.updates.observe import state_form
from packlight.updates.slices import like_eager, step_in_slices
from packlight.updates.twin import Group, stand_in, step_alone, step_several

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


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of several parameters that were stepped together twice.

    Attributes:
        bytes: what that allocated.
        step: steps them once more.
    """

    bytes: TwoSteps
    step: Callable[[], None]


def measure_copies(
    optimizer: torch.optim.Optimizer,
    indices: Sequence[int],
    parameters: Sequence[tuple[torch.Tensor, tuple[int, ...]]],
) -> Copies:
    """Return what two steps of copies of some parameters show.

    Args:
        optimizer: whose `param_groups` they are of.
        indices: which of those, each parameter's.
        parameters: with the strides of their gradients.
    """
    held: dict[int, list[torch.Tensor]] = {}
    gradients: dict[int, list[torch.Tensor]] = {}
    for index, (parameter, stride) in zip(indices, parameters, strict=True):
        copy = torch.nn.Parameter(_filled(parameter, parameter.stride()))
        held.setdefault(index, []).append(copy)
        gradients.setdefault(index, []).append(_filled(parameter, stride))
    twin = stand_in(optimizer, [optimizer.param_groups[i] for i in held], [*held.values()])
    groups = [(group, group["params"]) for group in twin.param_groups]
    pairs = [*zip(chain(*held.values()), chain(*gradients.values()), strict=True)]

    def step() -> None:
        step_several(twin, groups, [like_eager(g, copy) for copy, g in pairs], twin.state)

    device = pairs[0][0].device
    return Copies(measure_two_steps(step, twin.state, device), step)


def _filled(like: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    last = sum((size - 1) * step for size, step in zip(like.shape, stride, strict=True))
    num_elements = last + 1 if like.numel() else 0
    values = torch.full((num_elements,), _FILLER, dtype=like.dtype, device=like.device)
    return values.as_strided(like.shape, stride)
