"""The rivals: what users of PyTorch do to train in less memory, one row for each setting.

All but the rows called "inductor", and those with other libraries' optimizers, run the same kernels
as eager PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.models import Built, LossFn, adamw
from benchmarks.peers import optimizers
from benchmarks.peers.cases import Case
from benchmarks.peers.checkpointing import in_segments, per_block, selective
from benchmarks.peers.compiled import eager_kernels, inductor
from benchmarks.peers.hooks import on_cpu, on_disk, update_in_backward
from benchmarks.peers.rockmate import rockmate
from benchmarks.workbench import Step, Workbench, accumulated

CHECKPOINT = "torch.utils.checkpoint"
SELECTIVE = "selective checkpoint"
SEQUENTIAL = "checkpoint_sequential"
MEMORY_BUDGET = "activation_memory_budget"
INDUCTOR = "inductor"
ROCKMATE = "rockmate"
HOOKS = "saved-tensor hooks"
IN_BACKWARD = "update in backward"
MICROBATCHES = "microbatches"
AUTOCAST = "bf16 autocast"

# What a row changes beside memory and time: nothing, the order of sums, precision, or place.
EXACT, SUMS, LOW_BIT, BF16, DISK = "nothing", "order of sums", "8-bit state", "bf16", "uses a disk"

PER_BLOCK = "per block"
COMPILE_LIMIT_SECONDS = 120.0

Prepare = Callable[[Built], LossFn]


@dataclass(frozen=True)
class Rival:
    """One rival at one setting.

    Attributes:
        changes: what it changes beside memory and time; one of the names above.
        prepare: built model -> its loss function; called once, may compile lazily.
        run: bench and loss function -> step.
        optimizer: a name in `optimizers`.
        is_compiled: its first step is unlike the others.
        is_apart: it runs in a process and an environment of its own.
    """

    tool: str
    setting: str = ""
    changes: str = EXACT
    prepare: Prepare = lambda built: built.loss_fn
    run: Callable[[Workbench, LossFn], Step] = Workbench.eager_step
    optimizer: str = optimizers.TORCH
    is_compiled: bool = False
    is_apart: bool = False


def rivals_of(case: Case, quick: bool, built: Built) -> list[Rival]:
    """Return every rival at every setting that a case is run with."""
    both = f"{PER_BLOCK} and "
    rivals = [
        Rival(CHECKPOINT, PER_BLOCK, prepare=per_block),
        Rival(CHECKPOINT, "every second block", prepare=_every_second),
        Rival(SELECTIVE, "matmul and attention saved", prepare=selective),
    ]
    rivals += [
        Rival(SEQUENTIAL, f"{n} segments", prepare=functools.partial(in_segments, num_segments=n))
        for n in case.segments if n <= len(built.blocks)
    ]
    rivals += [
        Rival(MEMORY_BUDGET, f"{ratio:g}", is_compiled=True,
              prepare=functools.partial(eager_kernels, ratio=ratio))
        for ratio in (case.memory_budgets[:1] if quick else case.memory_budgets)
    ]
    rivals += [
        Rival(INDUCTOR, "no budget" if ratio == 1.0 else f"{MEMORY_BUDGET} {ratio:g}", SUMS,
              prepare=functools.partial(inductor, ratio=ratio), is_compiled=True)
        for ratio in (() if quick else case.inductor_budgets)
    ]
    rivals += [
        Rival(ROCKMATE, "", prepare=rockmate, is_apart=True),
        Rival(HOOKS, "save_on_cpu", prepare=on_cpu),
        Rival(HOOKS, "to disk", DISK, prepare=on_disk),
        Rival(IN_BACKWARD, run=update_in_backward, optimizer=optimizers.EACH),
        Rival(CHECKPOINT, both + IN_BACKWARD, prepare=per_block, run=update_in_backward,
              optimizer=optimizers.EACH),
    ]
    has_batch_norm = any(isinstance(m, _BatchNorm) for m in built.model.modules())
    if case.microbatches > 1 and not has_batch_norm:
        cut = functools.partial(_microbatches, count=case.microbatches)
        name = f"{case.microbatches} {MICROBATCHES}"
        rivals += [
            Rival(MICROBATCHES, f"{case.microbatches}", SUMS, prepare=cut),
            Rival(CHECKPOINT, both + name, SUMS, prepare=functools.partial(cut, within=per_block)),
        ]
    low_bit = [optimizers.BITSANDBYTES, *([optimizers.TORCHAO] if case.optimizer is adamw else [])]
    for choice in low_bit:
        rivals += [
            Rival(choice, "", LOW_BIT, optimizer=choice),
            Rival(CHECKPOINT, both + choice, LOW_BIT, prepare=per_block, optimizer=choice),
        ]
    rivals += [
        Rival(AUTOCAST, "", BF16, prepare=_autocast),
        Rival(CHECKPOINT, both + AUTOCAST, BF16,
              prepare=functools.partial(_autocast, within=per_block)),
    ]
    return rivals


def _every_second(built: Built) -> LossFn:
    return per_block(built, every=2)


def _plain(built: Built) -> LossFn:
    return built.loss_fn


def _microbatches(built: Built, count: int, within: Prepare = _plain) -> LossFn:
    return accumulated(within(built), count)


def _autocast(built: Built, within: Prepare = _plain) -> LossFn:
    inner = within(built)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16):
            return inner(model, batch)

    return loss_fn
