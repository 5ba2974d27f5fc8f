"""torch.compile: its `activation_memory_budget`, and Packlight's backend."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._decomp import get_decompositions
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.models import Built, LossFn
from packlight.backend import PacklightBackend

_ATEN = torch.ops.aten
_BATCH_NORM = [
    _ATEN.native_batch_norm, _ATEN._native_batch_norm_legit_functional,
    _ATEN.native_batch_norm_backward,
]


def eager_kernels(built: Built, ratio: float) -> LossFn:
    """Return the loss by AOTAutograd with torch's own partitioner and eager kernels.

    Batch norm is decomposed, as inductor does: undecomposed, its backward reads the statistics
    that the forward has overwritten by then, and fails its version check.

    Args:
        built: the model.
        ratio: torch's `activation_memory_budget`: of saved activations, not of the peak.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    has_batch_norm = any(isinstance(m, _BatchNorm) for m in built.model.modules())
    backend = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=get_decompositions(_BATCH_NORM) if has_batch_norm else None,
    )
    return _with_ratio(built, backend, ratio, "min_cut")


def inductor(built: Built, ratio: float) -> LossFn:
    """Return the loss with inductor's own kernels."""
    return _with_ratio(built, "inductor", ratio, "inductor")


def packlight_backend(built: Built, budget_bytes: int) -> LossFn:
    """Return the loss with Packlight's backend; the budget is for activations and gradients."""
    backend = PacklightBackend(budget_bytes=budget_bytes, progress=False)
    return torch.compile(
        distinct(built.loss_fn, f"packlight_{budget_bytes}"), backend=backend, fullgraph=True,
        dynamic=False,
    )


def _with_ratio(built: Built, backend: Any, ratio: float, name: str) -> LossFn:
    import torch._functorch.config as functorch_config

    compiled = torch.compile(
        distinct(built.loss_fn, f"{name}_{ratio}"), backend=backend, fullgraph=True, dynamic=False
    )
    is_first = True

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal is_first
        if not is_first:
            return compiled(model, batch)
        is_first = False
        with functorch_config.patch(activation_memory_budget=ratio):
            return compiled(model, batch)

    return loss_fn


def distinct(function: LossFn, name: str) -> LossFn:
    """Return a copy of a function that dynamo caches apart from its siblings."""
    assert isinstance(function, types.FunctionType)
    identifier = "".join(c if c.isalnum() else "_" for c in name)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{identifier}")
    return types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )


class TooSlowError(RuntimeError):
    """A rival's first step took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlowError in the block when it takes longer than `seconds`."""

    def stop(signal_number: int, frame: Any) -> None:
        raise TooSlowError(f"the first step took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
