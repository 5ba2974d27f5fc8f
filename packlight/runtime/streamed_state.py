"""Optimizer state that lies on a tier between updates and is in memory only around its own.

The optimizer keeps its `state` dictionary; what is on the tier is stood in for there by empty
tensors. Asked for its `state_dict`, it gets everything back into memory first.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from packlight.runtime.offload.tier import SlotSpec, Tier
from packlight.runtime.twin import step_alone

# Step counters and the like stay where they are.
MIN_STREAMED_BYTES = 4096


def state_slots(
    optimizer: torch.optim.Optimizer, parameters: Mapping[int, nn.Parameter]
) -> dict[int, dict[str, SlotSpec]]:
    """Return what of each parameter's optimizer state can be streamed, observed on copies.

    Args:
        optimizer: the user's; it is not changed.
        parameters: by primal.
    """
    known: dict[Any, dict[str, SlotSpec]] = {}
    group_of = {id(p): (i, g) for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    slots = {}
    for primal, parameter in parameters.items():
        index, group = group_of[id(parameter)]
        key = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if key not in known:
            copy = torch.zeros_like(parameter)
            state: dict[Any, Any] = defaultdict(dict)
            with torch.no_grad():
                step_alone(optimizer, group, copy, torch.zeros_like(parameter), state)
            known[key] = {
                name: SlotSpec.of(value, name)
                for name, value in state[copy].items()
                if isinstance(value, torch.Tensor) and value.nbytes >= MIN_STREAMED_BYTES
            }
        slots[primal] = known[key]
    return slots


class StreamedState:
    """The optimizer state of some parameters, on a tier.

    Its methods follow a tier's, with a primal in the place of a slot (see runtime/program.py).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[int, nn.Parameter],
        slots: Mapping[int, Mapping[str, SlotSpec]],
        make_tier: Callable[[Sequence[SlotSpec]], Tier],
    ) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._slot_of: dict[int, dict[str, int]] = {}
        specs: list[SlotSpec] = []
        for primal, named in slots.items():
            self._slot_of[primal] = {}
            for name, spec in named.items():
                self._slot_of[primal][name] = len(specs)
                specs.append(spec)
        self.tier = make_tier(specs)
        self._is_parked: set[int] = set()
        bring_back = weakref.WeakMethod(self.bring_back)

        def before_state_dict(_: torch.optim.Optimizer) -> None:
            method = bring_back()
            if method is not None:
                method()

        self._hook = optimizer.register_state_dict_pre_hook(before_state_dict)

    def fetch(self, primal: int) -> None:
        """Start bringing a parameter's state into memory; nothing if it does not exist yet."""
        if primal in self._is_parked:
            state = self._optimizer.state[self._parameters[primal]]
            for name, slot in self._slot_of[primal].items():
                state[name] = self.tier.fetch(slot)

    def wait_fetched(self, primal: int) -> None:
        """Return when a parameter's state is in memory."""
        if primal in self._is_parked:
            for slot in self._slot_of[primal].values():
                self.tier.wait_fetched(slot)
            self._is_parked.discard(primal)

    def offload(self, primal: int) -> None:
        """Start writing a parameter's state."""
        state = self._optimizer.state[self._parameters[primal]]
        for name, slot in self._slot_of[primal].items():
            self.tier.offload(slot, state[name])

    def wait_written(self, primal: int) -> None:
        """Let go of a parameter's state when it is written."""
        state = self._optimizer.state[self._parameters[primal]]
        for name, slot in self._slot_of[primal].items():
            self.tier.wait_written(slot)
            state[name] = torch.empty(0, dtype=state[name].dtype, device=state[name].device)
        self._is_parked.add(primal)

    def park(self) -> None:
        """Bring all state that is in memory to the tier: before a step, after a `state_dict`."""
        self.tier.wait_all()
        for primal, parameter in self._parameters.items():
            if primal not in self._is_parked and self._optimizer.state.get(parameter):
                self.offload(primal)
                self.wait_written(primal)

    def bring_back(self) -> None:
        """Have all state in memory, for whoever wants to look at it or save it."""
        for primal in sorted(self._is_parked):
            self.fetch(primal)
            self.wait_fetched(primal)

    def close(self) -> None:
        """Have all state in memory for good."""
        self.bring_back()
        self._hook.remove()
        self.tier.close()
