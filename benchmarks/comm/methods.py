"""The methods that are compared: how a step's gradients, or many steps' changes, get around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from packlight import comm

LEARNING_RATE = 4e-3
SGD_LEARNING_RATE = 0.3
POST_LOCAL_STEPS = 8
# Gradients that are fp32 in the first phase of 1-bit Adam, and in torch's hooks.
WARMUP_STEPS = 60

# What stands for the model in the forward and for the optimizer; and what follows the backward.
Started = tuple[nn.Module, torch.optim.Optimizer, Callable[[], Any]]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        library: whose it is.
        baseline: what it is compared to: the same optimizer, everything sent in fp32.
        optimizer: makes the inner optimizer of a model.
        start: puts both to work.
    """

    library: str
    baseline: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    start: Callable[[nn.Module, torch.optim.Optimizer], Started]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=SGD_LEARNING_RATE, momentum=0.9)


def _sgd_without_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=SGD_LEARNING_RATE)


def _one_bit(model: nn.Module) -> torch.optim.Optimizer:
    return comm.OneBitAdam(model.parameters(), lr=LEARNING_RATE, warmup_steps=WARMUP_STEPS)


def _ddp(register: Callable[[DistributedDataParallel], object] | None = None) -> Any:
    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        wrapped = DistributedDataParallel(model)
        if register is not None:
            register(wrapped)
        return wrapped, optimizer, optimizer.step

    return start


def _hook(compressor: Any, **options: Any) -> Any:
    return _ddp(lambda model: comm.hook(model, compressor, **options))


def _local(make: Callable[..., comm.LocalSteps], *arguments: Any, **options: Any) -> Any:
    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        local = make(model, *arguments, **options)

        def step() -> None:
            optimizer.step()
            local.step()

        return model, optimizer, step

    return start


def _torch_power(rank: int) -> Any:
    def register(model: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=WARMUP_STEPS,
            min_compression_rate=1,
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return _ddp(register)


def _torch_post_local(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    wrapped = DistributedDataParallel(model)
    state = PostLocalSGDState(None, None, WARMUP_STEPS, post_local_gradient_allreduce=False)
    wrapped.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(period=POST_LOCAL_STEPS, warmup_steps=WARMUP_STEPS)
    local = PostLocalSGDOptimizer(optimizer, averager)
    return wrapped, local, local.step


def _ef(density: float, values: str, decay: float = 1.0, **options: Any) -> comm.Compressor:
    return comm.ErrorFeedback(comm.TopK(density, values, **options), decay)


ADAMW, SGD = "DDP, fp32, AdamW", "DDP, fp32, SGD"


def _ours(start: Any, optimizer: Any = _adamw) -> Method:
    return Method("packlight", ADAMW if optimizer in (_adamw, _one_bit) else SGD, optimizer, start)


METHODS: dict[str, Method] = {
    ADAMW: Method("torch", ADAMW, _adamw, _ddp()),
    "topk:0.002+q1": _ours(_hook(_ef(0.002, "q1"), together=True)),
    "local 30, sparse": _ours(_local(
        comm.diloco, 30, 1.0, 0.0, _ef(0.01, "q2", 0.95), together=True)),
    "local 4, sparse": _ours(_local(
        comm.diloco, 4, 1.0, 0.0, _ef(0.01, "q2", 0.95), together=True)),
    "local 1, topk": _ours(_local(
        comm.diloco, 1, 1.0, 0.0, _ef(0.002, "q1"), together=True)),
    SGD: Method("torch", SGD, _sgd, _ddp()),
    "dgc:0.002": _ours(_hook(comm.dgc(0.002, 0.9, values="q1"), together=True), _sgd_without_momentum),
}
