"""How an optimizer's state and a weight are stored.

A state is stored as one tensor, or as codes and the largest magnitude of each block, which they
count in (`<name>_scale`). A weight is the parameter itself, of the dtype that the model has, and
with some formats a residual beside it, which holds what the rounding of the weight has cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from packlight.errors import OptionError
from packlight.optim.rules import moments_of

# Quantizing small tensors (norms, biases) saves nothing and costs most: Dettmers et al. 2021.
MIN_QUANTIZED_ELEMENTS = 4096

RESIDUAL = "residual"


@dataclass(frozen=True)
class StateFormat:
    """How a moment is stored.

    Attributes:
        code: by which kernels know it.
        dtype: of what is stored.
        block_elements: how many elements share a scale; 0 if there is none.
        elements_per_item: of the stored tensor.
        is_random: whether rounding draws random numbers.
    """

    code: int
    dtype: torch.dtype
    block_elements: int = 0
    elements_per_item: int = 1
    is_random: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it stores codes and scales."""
        return self.block_elements > 0


# A moment in bfloat16 is rounded stochastically: rounded to nearest, a second moment with
# beta2 = 0.999 would neither grow nor fall, since a thousandth is less than half a last place.
STATE_FORMATS = {
    "fp32": StateFormat(0, torch.float32),
    "bf16": StateFormat(1, torch.bfloat16, is_random=True),
    "8bit": StateFormat(2, torch.uint8, block_elements=256),
    "4bit": StateFormat(3, torch.uint8, block_elements=128, elements_per_item=2),
}


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored and rounded.

    Attributes:
        code: by which kernels know it.
        dtype: of the parameter.
        residual_dtype: of what is kept beside it, if anything is.
        is_random: whether rounding draws random numbers.
    """

    code: int
    dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    is_random: bool = False


WEIGHT_FORMATS = {
    "fp32": WeightFormat(0, torch.float32),
    "bf16-nearest": WeightFormat(1, torch.bfloat16),
    "bf16-stochastic": WeightFormat(2, torch.bfloat16, is_random=True),
    "fp16-stochastic": WeightFormat(3, torch.float16, is_random=True),
    "bf16-kahan": WeightFormat(4, torch.bfloat16, torch.bfloat16),
    "bf16+8bit": WeightFormat(5, torch.bfloat16, torch.int8),
}


def check_formats(group: Mapping[str, Any]) -> None:
    """Refuse names of formats that are not known.

    Raises:
        OptionError: it names what there is.
    """
    if group["weights"] not in WEIGHT_FORMATS:
        raise OptionError(
            f"unknown weights={group['weights']!r}; known: {', '.join(WEIGHT_FORMATS)}"
        )
    states = group["states"]
    moments = [moment.name for moment in moments_of(group)]
    if isinstance(states, Mapping) and set(states) != set(moments):
        raise OptionError(
            f"states={states!r} names other moments than {group['rule']} keeps: "
            f"{', '.join(moments) or 'none'}"
        )
    for name in states.values() if isinstance(states, Mapping) else (states,):
        if name not in STATE_FORMATS:
            raise OptionError(f"unknown states={name!r}; known: {', '.join(STATE_FORMATS)}")


def state_format(group: Mapping[str, Any], moment: str, num_elements: int) -> StateFormat:
    """Return how a moment of a parameter with so many elements is stored.

    Args:
        group: its `states` is one name for all moments, or a name for each.
        moment: which one.
        num_elements: fewer than `MIN_QUANTIZED_ELEMENTS` are not quantized.
    """
    states = group["states"]
    chosen = STATE_FORMATS[states[moment] if isinstance(states, Mapping) else states]
    is_small = chosen.is_quantized and num_elements < MIN_QUANTIZED_ELEMENTS
    return STATE_FORMATS["fp32"] if is_small else chosen


def is_small(group: Mapping[str, Any], num_elements: int) -> bool:
    """Whether a parameter keeps a moment in fp32 that larger ones have quantized."""
    states = group["states"]
    names = states.values() if isinstance(states, Mapping) else [states] * len(moments_of(group))
    is_quantized = any(STATE_FORMATS[name].is_quantized for name in names)
    return is_quantized and num_elements < MIN_QUANTIZED_ELEMENTS


def state_layout(group: Mapping[str, Any], num_elements: int) -> dict[str, tuple[torch.dtype, int]]:
    """Return (dtype, number of items) of every tensor in a parameter's state."""
    layout: dict[str, tuple[torch.dtype, int]] = {}
    for moment in moments_of(group):
        form = state_format(group, moment.name, num_elements)
        if not form.is_quantized:
            layout[moment.name] = (form.dtype, num_elements)
            continue
        num_blocks = -(-num_elements // form.block_elements)
        num_items = num_elements
        if form.elements_per_item > 1:  # whole blocks, so that all have the same layout
            num_items = num_blocks * form.block_elements // form.elements_per_item
        layout[moment.name] = (form.dtype, num_items)
        layout[f"{moment.name}_scale"] = (torch.float32, num_blocks)
    residual_dtype = WEIGHT_FORMATS[group["weights"]].residual_dtype
    if residual_dtype is not None:
        layout[RESIDUAL] = (residual_dtype, num_elements)
    return layout


def state_bytes(group: Mapping[str, Any], num_elements: int) -> int:
    """Return the size of a parameter's state."""
    layout = state_layout(group, num_elements).values()
    return sum(dtype.itemsize * num_items for dtype, num_items in layout)


def new_state(group: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """Return the state of a parameter that has not been stepped: all zero.

    Codes of zero with scales of zero are zeros, whatever the code stands for.
    """
    state: dict[str, Any] = {"step": 0}
    num_elements = parameter.numel()
    for name, (dtype, num_items) in state_layout(group, num_elements).items():
        if num_items == num_elements:
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            state[name] = torch.zeros(num_items, dtype=dtype, device=parameter.device)
    return state
