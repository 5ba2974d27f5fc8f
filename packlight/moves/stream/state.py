"""What of an optimizer's state can lie on a disk between updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.memory.tier import SlotSpec
from packlight.torch_internals.storages import num_storage_references
from packlight.updates.twin import step_alone

# Step counters, biases and the like stay where they are.
MIN_STREAMED_BYTES = 4096

Slots = dict[nn.Parameter, dict[str, SlotSpec]]


def state_slots(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Slots:
    """Return what of each parameter's optimizer state can be streamed, observed on copies.

    Args:
        optimizer: the user's; it is not changed.
        parameters: of the optimizer.
    """
    known: dict[Any, dict[str, SlotSpec]] = {}
    group_of = {id(p): (i, g) for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    slots: Slots = {}
    for parameter in parameters:
        index, group = group_of[id(parameter)]
        key = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if key not in known:
            copy = torch.zeros_like(parameter)
            state: dict[Any, Any] = defaultdict(dict)
            with torch.no_grad():
                step_alone(optimizer, group, copy, torch.zeros_like(parameter), state)
            known[key] = existing_slots(state[copy])
        slots[parameter] = known[key]
    return slots


def existing_slots(state: Mapping[str, Any]) -> dict[str, SlotSpec]:
    """Return what of one parameter's state can be streamed, by name."""
    return {
        name: SlotSpec.of(value, name)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.nbytes >= MIN_STREAMED_BYTES
    }


@dataclass(frozen=True, eq=False)
class StateHolder:
    """One tensor of a parameter's state, in the optimizer's dictionary."""

    optimizer: torch.optim.Optimizer
    parameter: nn.Parameter
    name: str

    def get(self) -> torch.Tensor | None:
        """Return the tensor, None before the first update."""
        value: torch.Tensor | None = self.optimizer.state.get(self.parameter, {}).get(self.name)
        return value

    @property
    def has_viewers(self) -> bool:
        """Whether others look at its memory (a `state_dict` that is kept)."""
        return has_viewers(self.optimizer.state[self.parameter][self.name])

    def set(self, value: torch.Tensor) -> None:
        """Put another tensor in its place."""
        self.optimizer.state[self.parameter][self.name] = value


def has_viewers(tensor: torch.Tensor) -> bool:
    """Whether any other tensor looks at a tensor's memory, told by its storage's reference count.

    A new tensor, which nobody else looks at, shows what the count is then.
    """
    return num_storage_references(tensor) > num_storage_references(torch.empty(1))
