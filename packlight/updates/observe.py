"""What an optimizer's step does to small made-up parameters: observed, not looked up by its name.

Two things are asked: whether stepping parameters one by one gives the bits of stepping them
together, and whether stepping slices of a parameter gives the bits of stepping it whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.costs.measure import same_bits
from packlight.torch_internals.optimizers import plain_step
from packlight.updates.slices import ALIGNED_ELEMENTS, step_in_slices
from packlight.updates.twin import (
    Group,
    State,
    needs_closure,
    settings,
    stand_in,
    step_alone,
    trainable,
    wrapped_optimizer,
)

# RAdam computes something else from its sixth step on.
NUM_STEPS = 8

# Schedulers start at learning rates at which no parameter moves, which would hide what a step does.
SMALLEST_LR = 1e-2

_SMALL_DIMS = (24, 7, 3, 3, 3)

# Where pieces of a parameter may begin: anywhere, where vectors do, where blocks of quantized
# states do. And how many elements count as many, for optimizers that treat small ones otherwise.
PIECE_UNITS = (1, ALIGNED_ELEMENTS, 2048)
LARGE_ELEMENTS = 8192


@dataclass(frozen=True, slots=True)
class Kind:
    """What parameters have in common for which one observation holds."""

    ndim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: torch.Tensor) -> Kind:
        """Return a parameter's kind."""
        return cls(parameter.ndim, parameter.dtype, parameter.device)


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """How parameters of a kind can be stepped in slices along their first dimension.

    Attributes:
        state_form: see `state_form`.
        needs_alignment: whether only aligned slices give the whole's bits, so that it matters where
            a kernel splits its work among threads.
    """

    state_form: frozenset[tuple[str, Any, bool]]
    needs_alignment: bool

    @property
    def split_names(self) -> frozenset[str]:
        """The state tensors that have the parameter's shape and are sliced with it."""
        return frozenset(name for name, _, is_split in self.state_form if is_split)


def state_form(state: State, shape: tuple[int, ...]) -> frozenset[tuple[str, Any, bool]]:
    """Return (name, dtype or type, whether it has the parameter's shape) of each entry of a state.

    Optimizers that keep something else for large parameters than for small ones (quantized states)
    show in this.
    """
    return frozenset(
        (name, v.dtype, v.shape == shape) if isinstance(v, torch.Tensor) else (name, type(v), False)
        for name, v in state.items()
    )


class MadeUp:
    """Random tensors of its own generator: the user's random numbers stay as they are."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def tensor(self, shape: tuple[int, ...], kind: Kind, scale: float = 1.0) -> torch.Tensor:
        """Return normally distributed values of a kind's dtype on its device."""
        dtype = torch.complex64 if kind.dtype.is_complex else torch.float32
        values = torch.randn(shape, generator=self._generator, dtype=dtype) * scale
        return values.to(kind.device, kind.dtype)


def why_not_alone(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the optimizer cannot step one parameter at a time, in words, or None if it can.

    Small copies of two parameters of each kind in each group are stepped together by one stand-in,
    and one after the other, last first, by another; parameters and states must agree in every
    bit, and nothing else may have been written.
    """
    if needs_closure(optimizer):
        return "its step() needs a closure that computes the loss"
    wrapped = wrapped_optimizer(optimizer)
    if wrapped is not None:
        return f"it steps another optimizer, its attribute {wrapped!r}"
    made_up = MadeUp()
    copies: list[list[torch.Tensor]] = []
    for group in optimizer.param_groups:
        kinds = dict.fromkeys(Kind.of(p) for p in trainable(group))
        copies.append([made_up.tensor(_small_shape(k.ndim), k) for k in kinds for _ in range(2)])
    try:
        return _compare_together_and_alone(optimizer, copies, made_up)
    except Exception as error:  # anything a third party's step may raise is a reason not to use it
        return f"its step() failed on small copies of the parameters: {error}"


def _compare_together_and_alone(
    optimizer: torch.optim.Optimizer, copies: list[list[torch.Tensor]], made_up: MadeUp
) -> str | None:
    groups = optimizer.param_groups
    together, alone = (
        _moving(stand_in(optimizer, groups, [[_parameter(c) for c in held] for held in copies]))
        for _ in range(2)
    )
    pairs = [
        (group, a, b)
        for mine, group in zip(together.param_groups, alone.param_groups, strict=True)
        for a, b in zip(mine["params"], group["params"], strict=True)
    ]
    step = plain_step(type(optimizer))
    for step_index in range(NUM_STEPS):
        gradients = [made_up.tensor(a.shape, Kind.of(a), 0.1 + step_index) for _, a, _ in pairs]
        for (_, a, _), gradient in zip(pairs, gradients, strict=True):
            a.grad = gradient.clone()
        before = settings(together)
        step(together)
        after = settings(together)
        # Flags set by the first step would be set again by each twin, which the bits judge. But
        # what is in a group is saved with it, and what changes later counts.
        written = [
            name
            for name in before | after
            if before.get(name) != after.get(name) and (step_index > 0 or name.startswith("group"))
        ]
        if written:
            return f"its step() writes {written[0]}, which its parameters share"
        for (group, _, b), gradient in reversed(list(zip(pairs, gradients, strict=True))):
            step_alone(alone, group, b, gradient.clone(), alone.state)
        keys = {id(a) for _, a, _ in pairs}
        if any(id(key) not in keys for key in together.state):
            return "it keeps state that belongs to no single parameter"
        for group_index, (_, a, b) in enumerate(pairs):
            if not same_bits(a, b) or not _same_state(together.state[a], alone.state[b]):
                return (
                    "stepping its parameters one by one does not give the bits of stepping them "
                    f"together (seen at step {step_index + 1} on small copies of shape "
                    f"{tuple(pairs[group_index][1].shape)})"
                )
    return None


def observe_slices(optimizer: torch.optim.Optimizer, group: Group, kind: Kind) -> SliceFacts | None:
    """Return how parameters of a kind can be stepped in slices, or None if they must stay whole."""
    if kind.ndim == 0:
        return None
    # An inner size of 64 or 63 elements: two rows are aligned, or hardly any is.
    inner = {1: (), 2: (64,), 3: (8, 8)}.get(kind.ndim, (4, 4, 4) + (1,) * (kind.ndim - 4))
    odd_inner = {1: (), 2: (63,)}.get(kind.ndim, (9, 7) + (1,) * (kind.ndim - 3))
    rows, odd_rows = (2 * ALIGNED_ELEMENTS, 61) if kind.ndim == 1 else (6, 5)
    num_rows = 8 * rows - rows // 3
    try:
        form = _compare_slices(optimizer, group, kind, (num_rows, *inner), rows)
        if form is None:
            return None
        is_free = _compare_slices(optimizer, group, kind, (num_rows, *odd_inner), odd_rows) == form
        is_free = is_free and _is_layout_free(optimizer, group, kind, odd_inner)
    except Exception:  # a step that fails on slices has to be done whole
        return None
    return SliceFacts(form, needs_alignment=not is_free)


def _compare_slices(
    optimizer: torch.optim.Optimizer, group: Group, kind: Kind, shape: tuple[int, ...], rows: int
) -> frozenset[tuple[str, Any, bool]] | None:
    """Return the form of the state if slices give the whole's bits, else None."""
    made_up = MadeUp()
    values = made_up.tensor(shape, kind)
    whole, sliced = _parameter(values), _parameter(values)
    one, two = (_moving(stand_in(optimizer, [group], [[p]])) for p in (whole, sliced))
    form = None
    for step_index in range(NUM_STEPS):
        gradient = made_up.tensor(shape, kind, 0.1 + step_index)
        step_alone(one, one.param_groups[0], whole, gradient.clone(), one.state)
        state = one.state.get(whole, {})
        if form not in (None, state_form(state, shape)):
            return None
        form = state_form(state, shape)
        names = SliceFacts(form, True).split_names
        step_in_slices(two, two.param_groups[0], sliced, gradient, two.state, rows, names)
        if not same_bits(whole, sliced) or not _same_state(state, two.state.get(sliced, {})):
            return None
    return form


def observe_pieces(optimizer: torch.optim.Optimizer, group: Group, kind: Kind) -> int | None:
    """Return at multiples of how many elements pieces can be parameters of their own.

    None if a parameter of a kind has to be stepped whole.
    """
    if kind.ndim == 0:
        return None
    try:
        return next(
            (unit for unit in PIECE_UNITS if _are_same_in_pieces(optimizer, group, kind, unit)),
            None,
        )
    except Exception:  # a step that fails on pieces has to be done whole
        return None


def _are_same_in_pieces(
    optimizer: torch.optim.Optimizer, group: Group, kind: Kind, unit: int
) -> bool:
    made_up = MadeUp()
    row = 63 if unit == 1 else unit  # (pieces of odd sizes)
    inner = () if kind.ndim == 1 else (row, *(1,) * (kind.ndim - 2))
    per_row = row if kind.ndim == 1 else 1
    rows = ceil(LARGE_ELEMENTS / row)
    cuts = [0, 3 * rows * per_row, 4 * rows * per_row]
    values = made_up.tensor((cuts[-1], *inner), kind)
    whole: torch.Tensor = _parameter(values)
    pieces: list[torch.Tensor] = [_parameter(values[a:b]) for a, b in pairwise(cuts)]
    one, two = (_moving(stand_in(optimizer, [group], [held])) for held in ([whole], pieces))
    for step_index in range(NUM_STEPS):
        gradient = made_up.tensor(tuple(whole.shape), kind, 0.1 + step_index)
        step_alone(one, one.param_groups[0], whole, gradient.clone(), one.state)
        for piece, (a, b) in zip(pieces, pairwise(cuts), strict=True):
            step_alone(two, two.param_groups[0], piece, gradient[a:b].clone(), two.state)
        if not same_bits(whole.detach(), torch.cat([piece.detach() for piece in pieces])):
            return False
    return True


def _is_layout_free(
    optimizer: torch.optim.Optimizer, group: Group, kind: Kind, inner: tuple[int, ...]
) -> bool:
    """Whether a step in scalar code, forced by gaps between elements, gives a vectorized's bits."""
    made_up = MadeUp()
    shape = (2**15 // prod(inner), *inner)
    values = made_up.tensor(shape, kind)
    dense, gappy = _parameter(values), _parameter(torch.stack([values, values], -1)[..., 0])
    twins = [stand_in(optimizer, [group], [[p]]) for p in (dense, gappy)]
    for step_index in range(NUM_STEPS):
        gradient = made_up.tensor(shape, kind, 0.1 + step_index)
        for twin, parameter in zip(map(_moving, twins), (dense, gappy), strict=True):
            step_alone(twin, twin.param_groups[0], parameter, gradient.clone(), twin.state)
        if not same_bits(dense.detach(), gappy.detach().contiguous()):
            return False
    return True


def _small_shape(ndim: int) -> tuple[int, ...]:
    return (*_SMALL_DIMS, *(2,) * ndim)[:ndim]


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(
        torch.empty_strided(
            values.shape, values.stride(), dtype=values.dtype, device=values.device
        ).copy_(values)
    )


def _moving(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give a stand-in learning rates at which its parameters move; return it."""
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if isinstance(lr, torch.Tensor):
            group["lr"] = lr.clamp(min=SMALLEST_LR)
        elif isinstance(lr, (int, float)):
            group["lr"] = max(lr, SMALLEST_LR)
    return optimizer


def _same_state(a: State, b: State) -> bool:
    leaves, form = pytree.tree_flatten(a)
    others, other_form = pytree.tree_flatten(b)
    return form == other_form and all(map(_same_value, leaves, others))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and same_bits(a, b)
    return type(a) is type(b) and bool(a == b)
