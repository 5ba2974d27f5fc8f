"""What of a captured call counts beside its graph: which inputs, which copies, which results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from packlight.capture.joint import JointStep
from packlight.capture.step_capture import CapturedLoss
from packlight.moves.microbatch.split import num_rows
from packlight.moves.request import Beside
from packlight.torch_internals.autograd import has_gradient_hooks
from packlight.updates.accounting import measure_optimizer, tensors_bytes
from packlight.updates.gradients import fills_storage

# What hooks of a parameter hold of its gradient's size: the copy that they are given, what they
# return, and something in between.
HOOKED_GRADIENTS = 3


def primals_among(loss: CapturedLoss, tensors: Container[Any]) -> dict[int, torch.Tensor]:
    """Return those of some tensors that are a captured call's inputs, by position."""
    return {
        primal: argument
        for primal, argument in enumerate(loss.arguments)
        if isinstance(argument, torch.Tensor) and argument in tensors
    }


@dataclass(frozen=True, eq=False)
class Kept:
    """What a loop keeps beside a step.

    Attributes:
        tensors: of modules, parameters of optimizers, and those that were named themselves.
        state_bytes: the state of optimizers, made yet or not.
    """

    tensors: tuple[torch.Tensor, ...]
    state_bytes: int

    @classmethod
    def of(cls, beside: Iterable[Beside]) -> Kept:
        """Return what some objects hold; parameters that are frozen for now have a state, too."""
        tensors: list[torch.Tensor] = []
        state_bytes = 0
        for one in beside:
            if isinstance(one, torch.optim.Optimizer):
                tensors += [p for group in one.param_groups for p in group["params"]]
                state_bytes += measure_optimizer(one, only_trainable=False).state_bytes
            elif isinstance(one, nn.Module):
                tensors += [*one.parameters(), *one.buffers()]
            else:
                tensors.append(one)
        return cls(tuple(tensors), state_bytes)

    def bytes_beside(self, counted: Iterable[torch.Tensor]) -> int:
        """Return how much that is beyond tensors that are counted already."""
        known = [*counted]
        return tensors_bytes([*known, *self.tensors]) - tensors_bytes(known) + self.state_bytes


def extras_bytes(loss: CapturedLoss, batch: Any, num_microbatches: int) -> int:
    """Return the size of what a step returns beside the loss; in microbatches it has rows."""
    if num_microbatches == 1:
        return sum(value.untyped_storage().nbytes() for value in loss.extra_values)
    rows = num_rows(batch)
    return sum(value[:1].nbytes * rows for value in loss.extra_values if value.ndim)


def copied_bytes(
    joint: JointStep, trained: Mapping[int, nn.Parameter], *, is_reduced: bool
) -> dict[int, int]:
    """Return the sizes of gradients that share their storage and are copied: primal -> bytes.

    Two parameters that are only ever added have one gradient, those that are concatenated have
    slices of one, and that of a sum is one number: in buckets each has a place. Hooks are given a
    copy, and may return another gradient.
    """
    nodes = {p: node for p in trained if isinstance(node := joint.backward_results[p], fx.Node)}
    num_sharing = Counter(joint.buffer_of_node[node] for node in nodes.values())
    copied: dict[int, int] = {}
    for primal, node in nodes.items():
        if has_gradient_hooks(trained[primal]):
            copied[primal] = HOOKED_GRADIENTS * trained[primal].nbytes
        elif is_reduced:
            continue
        elif num_sharing[joint.buffer_of_node[node]] > 1 or not fills_storage(node.meta["val"]):
            copied[primal] = trained[primal].nbytes
    return copied
