"""Stepping a parameter slice by slice, so that what a step allocates has the size of a slice."""

from __future__ import annotations

from collections import defaultdict
from math import gcd, prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.updates.twin import Group, State, step_alone

# Kernels treat what is left over after whole vectors with scalar code, and in some (fused ones,
# those of bfloat16) that gives other bits. Slices of a multiple of this many elements leave
# nothing over: no CPU kernel takes more at once.
ALIGNED_ELEMENTS = 128


def rows_of_slices(parameter: torch.Tensor, max_rows: int, needs_alignment: bool) -> int:
    """Return how many rows of a parameter a slice has: `max_rows` or as many fewer as align it.

    Args:
        parameter: a tensor with at least one dimension.
        max_rows: how many rows would be wanted. It is exceeded where fewer cannot be aligned.
        needs_alignment: whether other bits are to be expected of slices that are not aligned; if
            not, few rows are better than aligned ones.
    """
    row_elements = prod(parameter.shape[1:])
    unit = ALIGNED_ELEMENTS // gcd(ALIGNED_ELEMENTS, row_elements)
    if max_rows < unit and not needs_alignment:
        return max(max_rows, 1)
    return max(max_rows // unit, 1) * unit


def step_in_slices(
    optimizer: torch.optim.Optimizer,
    group: Group,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    states: Any,
    rows_per_slice: int,
    split_names: frozenset[str],
) -> None:
    """Step one parameter as `step_alone` does, a slice at a time along its first dimension.

    Args:
        optimizer: whose class and attributes to use.
        group: the hyperparameters.
        parameter: contiguous, at least one dimension.
        gradient: of its shape, in any layout.
        states: mapping of parameters to state dicts, read and written.
        rows_per_slice: rows in each slice but the last.
        split_names: states of the parameter's shape, contiguous. The others (a step counter) are
            shared by the slices: each starts from the values before the step, the last one's stay.
    """
    state: State = states.get(parameter, {})
    before = dict(state)
    after: State = {}
    for start in range(0, parameter.shape[0], rows_per_slice):
        rows = slice(start, start + rows_per_slice)
        piece = torch.nn.Parameter(parameter.detach()[rows])
        pieces: Any = defaultdict(dict)
        if before:
            pieces[piece] = {
                name: value[rows] if name in split_names else _copied(value)
                for name, value in before.items()
            }
        step_alone(optimizer, group, piece, like_eager(gradient[rows], piece), pieces)
        if piece in pieces:  # else the optimizer keeps no state
            states[parameter] = state
            after = _gather(pieces.pop(piece), state, parameter.shape, rows, split_names)
    for name, value in after.items():
        if isinstance(value, torch.Tensor) and name in before:
            before[name].copy_(value)
        else:
            state[name] = value


def _gather(
    made: State, state: State, shape: torch.Size, rows: slice, split_names: frozenset[str]
) -> State:
    """Write a slice's state into its parameter's; return what is not split."""
    for name, value in made.items():
        if name not in split_names:
            state.setdefault(name, value)  # in the order in which the optimizer makes them
            continue
        if name not in state:
            state[name] = value.new_empty(shape)
        target = state[name][rows]
        if value.data_ptr() != target.data_ptr():  # made by this step and not in place
            target.copy_(value)
    return {name: value for name, value in made.items() if name not in split_names}


def like_eager(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the gradient in the layout that eager's accumulation gives it, copied if need be.

    That is the parameter's if that is dense, else row-major (`AccumulateGrad`). The layout decides
    which kernels run, and so the bits.
    """
    expected = _eager_strides(parameter)
    if all(
        mine == wanted or size == 1
        for mine, wanted, size in zip(gradient.stride(), expected, gradient.shape, strict=True)
    ):
        return gradient
    copied = torch.empty_strided(
        gradient.shape, expected, dtype=gradient.dtype, device=gradient.device
    )
    return copied.copy_(gradient)


def _eager_strides(parameter: torch.Tensor) -> tuple[int, ...]:
    if parameter.is_contiguous():
        return parameter.stride()
    on_meta = parameter.detach().to("meta", copy=True)  # keeps the strides of dense tensors
    if on_meta.stride() == parameter.stride():
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)
