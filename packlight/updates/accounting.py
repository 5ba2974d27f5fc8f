"""What a training step holds outside of its schedule: parameters, batch, optimizer state."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.capture.batch import tensors_of
from packlight.costs.measure import allocated_bytes
from packlight.costs.peak import allocator_peak
from packlight.errors import UnsupportedModelError
from packlight.torch_internals.storages import storage_identity
from packlight.updates.twin import (
    Group,
    needs_closure,
    stand_in,
    state_tensors,
    step_alone,
    trainable,
)

CLOSURE_HINT = (
    "use an optimizer whose step() takes no arguments; one that evaluates the loss itself (LBFGS, "
    "SAM) can step in a loop of your own, with the torch.compile backend"
)
# Some registers full of elements, and a few more.
NUM_PROBED = 69


def tensors_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of all storages behind tensors, shared ones counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        num_bytes = tensor.untyped_storage().nbytes()
        sizes[storage_identity(tensor)] = allocated_bytes(num_bytes, tensor.device)
    return sum(sizes.values())


def batch_bytes(batch: Any) -> int:
    """Return the size of all tensors in a batch (any nesting of containers)."""
    return tensors_bytes(tensors_of(batch))


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """What an optimizer holds and what its step allocates for a moment, in bytes."""

    state_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class TwoSteps:
    """What the first two steps of a parameter allocated, in bytes.

    Attributes:
        state_bytes: the state that the first step made.
        first_bytes: the first step's peak, the state included.
        later_bytes: the second step's peak.
    """

    state_bytes: int
    first_bytes: int
    later_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """The most that either step held beyond the state."""
        return max(self.first_bytes - self.state_bytes, self.later_bytes, 0)


def measure_two_steps(
    step: Callable[[], Any], states: Mapping[Any, Any], device: torch.device
) -> TwoSteps:
    """Call `step()` twice and return what it allocated on a device.

    Args:
        step: steps a stand-in that has no state yet.
        states: the stand-in's state.
        device: whose allocator to watch.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # what earlier calls left in reference cycles must not be freed in between
    try:
        _, first_bytes, _ = allocator_peak(step, device)
        held = tensors_bytes(state_tensors(dict(states)))
        _, later_bytes, _ = allocator_peak(step, device)
    finally:
        if was_enabled:
            gc.enable()
    return TwoSteps(held, first_bytes, later_bytes)


def measure_optimizer(
    optimizer: torch.optim.Optimizer, *, only_trainable: bool = True
) -> OptimizerMemory:
    """Return an optimizer's memory without stepping it and before its state exists.

    One parameter of each shape is copied and stepped twice by a stand-in for the optimizer: the
    first step shows the state it creates, the second what every later step allocates for a moment.
    Optimizers that treat all parameters at once (`foreach`, the default on CUDA) allocate for all
    of them together, so there the parameters' workspaces add up.

    Args:
        optimizer: any whose step needs no closure.
        only_trainable: leave parameters out that are frozen now.

    Raises:
        UnsupportedModelError: the optimizer's step needs a closure, or fails.
    """
    refuse_closure(optimizer)
    state_bytes = 0
    workspace = 0
    summed_workspace = 0
    known: dict[Any, TwoSteps] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in trainable(group) if only_trainable else group["params"]:
            key = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
            if key not in known:
                known[key] = _measure_whole(optimizer, group, parameter)
            one = known[key]
            existing = state_tensors(optimizer.state.get(parameter))
            state_bytes += tensors_bytes(existing) if existing else one.state_bytes
            is_together = group.get("foreach")
            if is_together is None:
                is_together = parameter.is_cuda and not group.get("fused")
            if is_together:
                summed_workspace += one.workspace_bytes
            workspace = max(workspace, one.workspace_bytes)
    return OptimizerMemory(state_bytes, max(workspace, summed_workspace))


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise if an optimizer's step takes a closure.

    Raises:
        UnsupportedModelError: it does.
    """
    if needs_closure(optimizer):
        raise UnsupportedModelError(
            f"{type(optimizer).__name__}.step() needs arguments (a closure?): its memory cannot be "
            f"promised\nhint: {CLOSURE_HINT}"
        )


def refuse_uneven_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a fused kernel steps some elements of a parameter and leaves others as they are.

    torch 2.13's fused SGD does that on the CPU with bfloat16 and float16, without a word: of a
    vector only what is left over behind the last full register moves.

    Raises:
        UnsupportedModelError: equal elements with equal gradients differ after a step.
    """
    for group in optimizer.param_groups:
        kinds = {(p.dtype, p.device) for p in trainable(group)} if group.get("fused") else set()
        for dtype, device in sorted(kinds, key=str):
            copy = nn.Parameter(torch.ones(NUM_PROBED, dtype=dtype, device=device))
            twin = stand_in(optimizer, [group], [[copy]])
            twin.param_groups[0]["lr"] = 0.5  # a step that no dtype rounds away
            step_alone(twin, twin.param_groups[0], copy, torch.ones_like(copy), twin.state)
            num_still = int((copy == 1).sum())
            if 0 < num_still < NUM_PROBED:
                raise UnsupportedModelError(
                    f"{type(optimizer).__name__}(fused=True) leaves {num_still} of {NUM_PROBED} "
                    f"equal elements of a {dtype} parameter as they were: it does not train\n"
                    "hint: fused=False, or float32 parameters under allow={'bf16'}"
                )


def _measure_whole(
    optimizer: torch.optim.Optimizer, group: Group, parameter: torch.Tensor
) -> TwoSteps:
    copy = nn.Parameter(torch.zeros_like(parameter))
    gradient = torch.zeros_like(parameter)
    twin = stand_in(optimizer, [group], [[copy]])

    def step() -> None:
        step_alone(twin, twin.param_groups[0], copy, gradient, twin.state)

    try:
        return measure_two_steps(step, twin.state, parameter.device)
    except Exception as error:  # whatever a third party's step may raise
        raise UnsupportedModelError(
            f"{type(optimizer).__name__}.step() failed on a copy of a parameter: "
            f"{error or type(error).__name__}\nhint: {CLOSURE_HINT}"
        ) from error
