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
SGD_LEARNING_RATE = 0.2
# Steps whose gradients or parameters are averaged in fp32, before methods that need it begin.
WARMUP_STEPS = 40
POST_LOCAL_STEPS = 8
ADAMW, SGD = "DDP fp32, AdamW", "DDP fp32, SGD"

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


def _one_bit_adam(model: nn.Module) -> torch.optim.Optimizer:
    return comm.OneBitAdam(model.parameters(), lr=LEARNING_RATE, warmup_steps=WARMUP_STEPS)


def _ddp(register: Callable[[DistributedDataParallel], object] | None = None) -> Any:
    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Started:
        wrapped = DistributedDataParallel(model)
        if register is not None:
            register(wrapped)
        return wrapped, optimizer, lambda: optimizer.step()

    return start


def _torch_power(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=WARMUP_STEPS, min_compression_rate=1
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _torch_fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def _torch_post_local(model: nn.Module, optimizer: torch.optim.Optimizer) -> Started:
    wrapped = DistributedDataParallel(model)
    state = PostLocalSGDState(None, None, WARMUP_STEPS, post_local_gradient_allreduce=False)
    wrapped.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(period=POST_LOCAL_STEPS, warmup_steps=WARMUP_STEPS)
    local = PostLocalSGDOptimizer(optimizer, averager)
    return wrapped, local, lambda: local.step()


def _ours(start: Any, optimizer: Any = _adamw) -> Method:
    baseline = ADAMW if optimizer in (_adamw, _one_bit_adam) else SGD
    return Method("packlight", baseline, optimizer, start)


def _hook(compressor: comm.Compressor | str, optimizer: Any = _adamw, **options: Any) -> Method:
    def register(model: DistributedDataParallel) -> None:
        comm.hook(model, compressor, **options)

    return _ours(_ddp(register), optimizer)


def _local(make: Callable[..., comm.LocalSteps], *arguments: Any, **options: Any) -> Method:
    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Started:
        local = make(model, *arguments, **options)

        def step() -> None:
            optimizer.step()
            local.step()

        return model, optimizer, step

    return _ours(start)


def _sparse(density: float) -> comm.Compressor:
    return comm.ErrorFeedback(comm.TopK(density, "q1"))


def _bits(bits: int) -> comm.Compressor:
    return comm.ErrorFeedback(comm.Quantize(bits, block=1024))


METHODS: dict[str, Method] = {
    ADAMW: Method("torch", ADAMW, _adamw, _ddp()),
    "fp16_compress_hook": Method("torch", ADAMW, _adamw, _ddp(_torch_fp16)),
    "powerSGD_hook, rank 1": Method("torch", ADAMW, _adamw, _ddp(_torch_power)),
    "PostLocalSGDOptimizer, 8 steps": Method("torch", ADAMW, _adamw, _torch_post_local),
    "q8": _hook("q8"),
    "q4": _hook("q4"),
    "q1": _hook("q1"),
    "1-bit Adam": _hook(comm.OneBitMomentum(WARMUP_STEPS), _one_bit_adam),
    "qsgd:4+ans": _hook("qsgd:4+ans"),
    "powersgd:1": _hook("powersgd:1"),
    "gradzip:1": _hook("gradzip:1"),
    "randk:0.02+q1, together": _hook("randk:0.02+q1", together=True),
    "topk:0.01+q2, together": _hook("topk:0.01+q2", together=True),
    "topk:0.002+q1, together": _hook("topk:0.002+q1", together=True),
    SGD: Method("torch", SGD, _sgd, _ddp()),
    "dgc:0.01, together": _hook(comm.dgc(0.01), _sgd_without_momentum, together=True),
    "dgc:0.002+q1, together": _hook(
        comm.dgc(0.002, values="q1"), _sgd_without_momentum, together=True
    ),
    "sketch:0.01": _hook("sketch:0.01+momentum:0.9", _sgd_without_momentum, together=True),
    "post-local SGD, 8 steps": _local(comm.post_local_sgd, POST_LOCAL_STEPS, WARMUP_STEPS),
    "DiLoCo, 10 steps": _local(comm.diloco, 10),
    "streaming DiLoCo, 10 steps": _local(comm.streaming_diloco, 10, fragments=2, overlap=1),
    "local, 40 steps, fp32": _local(comm.diloco, 40, 1.0, 0.0),
    "local, 40 steps, q1": _local(comm.diloco, 40, 1.0, 0.0, _bits(1), together=True),
    "local, 20 steps, 10% q1": _local(comm.diloco, 20, 1.0, 0.0, _sparse(0.1), together=True),
    "local, 12 steps, 5% q1": _local(comm.diloco, 12, 1.0, 0.0, _sparse(0.05), together=True),
    "local, 10 steps, 1% q1": _local(comm.diloco, 10, 1.0, 0.0, _sparse(0.01), together=True),
    "local, 30 steps, 2% q1": _local(comm.diloco, 30, 1.0, 0.0, _sparse(0.02), together=True),
}
