"""Optimizer state that lies on a tier between updates and is in memory only around its own.

The optimizer keeps its `state` dictionary; what is on the tier is stood in for there by empty
tensors. Asked for its `state_dict`, it gets everything back into memory first.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from packlight.runtime.offload.tier import SlotSpec, Tier
from packlight.runtime.twin import step_alone

# Step counters and the like stay where they are.
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
            known[key] = {
                name: SlotSpec.of(value, name)
                for name, value in state[copy].items()
                if isinstance(value, torch.Tensor) and value.nbytes >= MIN_STREAMED_BYTES
            }
        slots[parameter] = known[key]
    return slots


class StreamedState:
    """The optimizer state of some parameters, on a tier."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        slots: Slots,
        make_tier: Callable[[Sequence[SlotSpec]], Tier],
    ) -> None:
        self._optimizer = optimizer
        self._slot_of: dict[nn.Parameter, dict[str, int]] = {}
        specs: list[SlotSpec] = []
        for parameter, named in slots.items():
            self._slot_of[parameter] = {}
            for name, spec in named.items():
                self._slot_of[parameter][name] = len(specs)
                specs.append(spec)
        self._tier = make_tier(specs)
        self._in_flight: set[nn.Parameter] = set()
        bring_back = weakref.WeakMethod(self.bring_back)

        def before_state_dict(_: torch.optim.Optimizer) -> None:
            method = bring_back()
            if method is not None:
                method()

        optimizer.register_state_dict_pre_hook(before_state_dict)

    def fetch(self, parameter: nn.Parameter) -> None:
        """Start bringing a parameter's state into memory; nothing if it does not exist yet."""
        if self._is_parked(parameter):
            state = self._optimizer.state[parameter]
            for name, slot in self._slot_of[parameter].items():
                state[name] = self._tier.fetch(slot)
            self._in_flight.add(parameter)

    def wait_fetched(self, parameter: nn.Parameter) -> None:
        """Return when a parameter's state is in memory."""
        if parameter in self._in_flight:
            for slot in self._slot_of[parameter].values():
                self._tier.wait_fetched(slot)
            self._in_flight.discard(parameter)

    def offload(self, parameter: nn.Parameter) -> None:
        """Start writing a parameter's state."""
        state = self._optimizer.state[parameter]
        for name, slot in self._slot_of[parameter].items():
            self._tier.offload(slot, state[name])

    def wait_written(self, parameter: nn.Parameter) -> None:
        """Let go of a parameter's state when it is written."""
        state = self._optimizer.state[parameter]
        for name, slot in self._slot_of[parameter].items():
            self._tier.wait_written(slot)
            state[name] = state[name].new_empty(0)

    def park(self) -> None:
        """Bring all state that is in memory to the tier.

        Before a step: after a `state_dict`, a `load_state_dict` or a failed step.
        """
        self._tier.wait_all()
        self._in_flight.clear()
        for parameter, slots in self._slot_of.items():
            has_state = bool(slots) and bool(self._optimizer.state.get(parameter))
            if has_state and not self._is_parked(parameter):
                self.offload(parameter)
                self.wait_written(parameter)

    def bring_back(self) -> None:
        """Have all state in memory, for whoever wants to look at it or save it."""
        for parameter in self._slot_of:
            self.fetch(parameter)
            self.wait_fetched(parameter)

    def _is_parked(self, parameter: nn.Parameter) -> bool:
        """Whether empty tensors stand in for a parameter's state."""
        state, slots = self._optimizer.state.get(parameter, {}), self._slot_of[parameter]
        return bool(slots and state) and all(state[n].numel() == 0 for n in slots)


class StateOfPrimals:
    """Streamed state as a step program sees it: by primal, with a tier's methods."""

    def __init__(self, states: StreamedState, parameter_of: Mapping[int, nn.Parameter]) -> None:
        self._states, self._parameter_of = states, parameter_of

    def fetch(self, primal: int) -> None:
        """See `StreamedState.fetch`."""
        self._states.fetch(self._parameter_of[primal])

    def wait_fetched(self, primal: int) -> None:
        """See `StreamedState.wait_fetched`."""
        self._states.wait_fetched(self._parameter_of[primal])

    def offload(self, primal: int) -> None:
        """See `StreamedState.offload`."""
        self._states.offload(self._parameter_of[primal])

    def wait_written(self, primal: int) -> None:
        """See `StreamedState.wait_written`."""
        self._states.wait_written(self._parameter_of[primal])
