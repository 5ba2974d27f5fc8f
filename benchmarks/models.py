"""The models that whole-step benchmarks train: how each is built, and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.models import make

LossFn = Callable[[nn.Module, Any], torch.Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

ADAMW_RATE, SGD_RATE, MOMENTUM = 1e-4, 1e-3, 0.9


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as torch gives it, with a small learning rate."""
    return torch.optim.AdamW(model.parameters(), lr=ADAMW_RATE)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD without state."""
    return torch.optim.SGD(model.parameters(), lr=SGD_RATE)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=SGD_RATE, momentum=MOMENTUM)


@dataclass(frozen=True)
class Case:
    """One model, batch and optimizer.

    Attributes:
        name: what the results and the command line call it.
        title: what the tables call it.
        family: its maker in `tests.models`, or the example it is.
        optimizer: makes the optimizer.
        sizes: arguments of the maker.
        quick_sizes: the same for a trial run.
        blocks: the paths of the module lists that are checkpointed block by block, separated by
            spaces; "" for none.
        num_rounds: how often every cell is timed.
    """

    name: str
    title: str
    family: str
    optimizer: MakeOptimizer
    sizes: dict[str, Any] = field(default_factory=dict)
    quick_sizes: dict[str, Any] = field(default_factory=dict)
    blocks: str = ""
    num_rounds: int = 3

    def build(self, quick: bool, device: str, seed: int) -> Built:
        """Return the model in training mode, its batch, its loss and its blocks."""
        model, batch, loss_fn = make(
            self.family, seed, **(self.quick_sizes if quick else self.sizes)
        )
        return self.built(model, batch, loss_fn, device)

    def built(self, model: nn.Module, batch: Any, loss_fn: LossFn, device: str) -> Built:
        """Return a model and its batch on a device, with the blocks found."""
        model.to(device)
        return Built(model, to_device(batch, device), loss_fn, self.blocks)


@dataclass
class Built:
    """A model that is ready to be trained.

    Attributes:
        block_paths: see `Case.blocks`.
        blocks: its repeated blocks, in order; each takes the stream as its first argument.
        initial: parameters and buffers before the first step.
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFn
    block_paths: str = ""
    blocks: list[nn.Module] = field(init=False)
    initial: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        lists = [self.model.get_submodule(path) for path in self.block_paths.split()]
        self.blocks = [block for found in lists for block in found]  # type: ignore[attr-defined]
        self.initial = {k: v.clone() for k, v in self.model.state_dict().items()}

    def another(self, in_bf16: bool = False) -> Built:
        """Return a copy that shares nothing but the batch, as it was before the first step.

        Args:
            in_bf16: weights and inputs are bfloat16, see `in_bfloat16`.
        """
        model, batch = copy.deepcopy(self.model), self.batch
        model.load_state_dict(self.initial)
        if in_bf16:
            model = in_bfloat16(model)
            batch = pytree.tree_map_only(torch.Tensor, _lowered, batch)
        return Built(model, batch, self.loss_fn, self.block_paths)


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    is_image = tensor.dim() == 4
    layout = torch.channels_last if is_image else torch.contiguous_format
    return tensor.to(torch.bfloat16, memory_format=layout)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Return the model with weights in bfloat16; batch norms stay float32."""
    model.bfloat16()
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        # oneDNN wants channels last in bfloat16; anything else it rearranges at every call.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def to_device(batch: Any, device: str) -> Any:
    """Return a batch with its tensors on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
