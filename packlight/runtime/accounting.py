"""What a training step holds outside of its schedule: parameters, batch, optimizer state."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from packlight.capture.measure import allocated_bytes
from packlight.capture.peak import measure_peak
from packlight.errors import UnsupportedModelError


def tensors_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of all storages behind tensors, shared ones counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = allocated_bytes(storage.nbytes(), tensor.device)
    return sum(sizes.values())


def batch_bytes(batch: Any) -> int:
    """Return the size of all tensors in a batch (any nesting of containers)."""
    leaves = pytree.tree_leaves(plain_containers(batch))
    return tensors_bytes(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def plain_containers(batch: Any) -> Any:
    """Return a batch whose outermost mapping is a plain dict, which pytree can look into."""
    return dict(batch) if hasattr(batch, "keys") and not isinstance(batch, dict) else batch


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """What an optimizer holds and what its step allocates for a moment, in bytes."""

    state_bytes: int
    workspace_bytes: int


def measure_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerMemory:
    """Return an optimizer's memory without stepping it and before its state exists.

    One parameter of each shape is copied and stepped twice by a copy of the optimizer, with zero
    gradients: the first step shows the state it creates, the second what every later step allocates
    for a moment. Optimizers that treat all parameters at once (`foreach`, the default on CUDA)
    allocate for all of them together, so there the parameters' workspaces add up.

    Raises:
        UnsupportedModelError: the optimizer's step needs a closure.
    """
    state_bytes = 0
    workspace = 0
    summed_workspace = 0
    known: dict[Any, OptimizerMemory] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            key = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
            if key not in known:
                known[key] = _measure_one(optimizer, group, parameter)
            one = known[key]
            existing = [
                v
                for v in optimizer.state.get(parameter, {}).values()
                if isinstance(v, torch.Tensor)
            ]
            state_bytes += tensors_bytes(existing) if existing else one.state_bytes
            is_together = group.get("foreach")
            if is_together is None:
                is_together = parameter.is_cuda and not group.get("fused")
            if is_together:
                summed_workspace += one.workspace_bytes
            workspace = max(workspace, one.workspace_bytes)
    return OptimizerMemory(state_bytes, max(workspace, summed_workspace))


def _measure_one(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor
) -> OptimizerMemory:
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [stand_in]}]
    # Hooks of the original are the user's business with the original.
    twin._optimizer_step_pre_hooks = type(optimizer._optimizer_step_pre_hooks)()
    twin._optimizer_step_post_hooks = type(optimizer._optimizer_step_post_hooks)()
    try:
        first = measure_peak(twin.step, parameter.device)
        second = measure_peak(twin.step, parameter.device)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(optimizer).__name__}.step() needs arguments (a closure?): its memory cannot be "
            "promised\nhint: use an optimizer whose step() takes no arguments"
        ) from error
    held = [v for v in twin.state[stand_in].values() if isinstance(v, torch.Tensor)]
    state_bytes = tensors_bytes(held)
    return OptimizerMemory(state_bytes, max(first.peak_bytes - state_bytes, second.peak_bytes, 0))
