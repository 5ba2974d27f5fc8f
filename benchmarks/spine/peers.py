"""The rivals: each turns a loss function into one that needs less memory for its backward.

All but the rows called "inductor" run the same kernels as eager PyTorch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._decomp import get_decompositions
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from benchmarks.spine.cases import Built, Case

LossFn = Callable[[nn.Module, Any], torch.Tensor]

EAGER = "eager"
CHECKPOINT = "torch.utils.checkpoint"
SEQUENTIAL = "checkpoint_sequential"
SELECTIVE = "selective checkpoint"
MEMORY_BUDGET = "activation_memory_budget"
INDUCTOR = "inductor"

_ATEN = torch.ops.aten
# The usual policy: what is costly to compute again, matrix products and attention, is kept.
_SAVED = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
}
_BATCH_NORM = [
    _ATEN.native_batch_norm, _ATEN._native_batch_norm_legit_functional,
    _ATEN.native_batch_norm_backward,
]


@dataclass(frozen=True)
class Peer:
    """One rival at one setting.

    Attributes:
        prepare: built model -> its loss function; called once, may compile lazily.
        is_compiled: its first step is unlike the others.
        compile_limit_seconds: give up if that takes longer.
    """

    tool: str
    setting: str
    prepare: Callable[[Built], LossFn]
    is_compiled: bool = False
    compile_limit_seconds: float | None = None


def peers_of(case: Case) -> list[Peer]:
    """Return every rival at every setting that a case is run with."""
    peers = [
        Peer(CHECKPOINT, "per block", per_block),
        Peer(SELECTIVE, "matmul and attention saved", _selective),
    ]
    peers += [
        Peer(SEQUENTIAL, f"{n} segments", functools.partial(_segments, n)) for n in case.segments
    ]
    peers += [
        Peer(MEMORY_BUDGET, f"{b:g}", functools.partial(_memory_budget, b), is_compiled=True)
        for b in case.memory_budgets
    ]
    peers += [
        Peer(INDUCTOR, "no budget" if b == 1.0 else f"{MEMORY_BUDGET} {b:g}",
             functools.partial(_inductor, b), is_compiled=True, compile_limit_seconds=60.0)
        for b in case.inductor_budgets
    ]
    return peers


# -- activation checkpointing: blocks' forwards are replaced while the forward runs


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for block, forward in forwards.items():
        block.forward = forward
    try:
        yield
    finally:
        for block in forwards:
            del block.forward  # the class's own again


def _with_forwards(built: Built, forwards: dict[nn.Module, Callable[..., Any]]) -> LossFn:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        with _replaced(forwards):
            return built.loss_fn(model, batch)

    return loss_fn


def per_block(built: Built) -> LossFn:
    """Return the loss with every block recomputed in the backward."""
    return _with_forwards(
        built,
        {b: functools.partial(checkpoint, b.forward, use_reentrant=False) for b in built.blocks},
    )


def _selective(built: Built) -> LossFn:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = operation in _SAVED
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return _with_forwards(
        built,
        {
            b: functools.partial(
                checkpoint, b.forward, use_reentrant=False, context_fn=contexts
            )
            for b in built.blocks
        },
    )


def _segments(num_segments: int, built: Built) -> LossFn:
    """The first block runs the whole sequence in segments, the others pass the stream through."""
    originals = [b.forward for b in built.blocks]

    def run_all(stream: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def bound(forward: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: forward(x, *args, **kwargs)

        chain = [bound(forward) for forward in originals]
        return checkpoint_sequential(chain, num_segments, stream, use_reentrant=False)

    forwards: dict[nn.Module, Callable[..., Any]] = {b: _first for b in built.blocks}
    forwards[built.blocks[0]] = run_all
    return _with_forwards(built, forwards)


def _first(stream: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return stream


# -- torch.compile's knob


def _memory_budget(ratio: float, built: Built) -> LossFn:
    """AOTAutograd with torch's own partitioner and eager kernels.

    Batch norm is decomposed, as inductor does: undecomposed, its backward reads the statistics
    that the forward has overwritten by then, and fails its version check.
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
    return _compiled_with_ratio(built, backend, ratio, "min_cut")


def _inductor(ratio: float, built: Built) -> LossFn:
    return _compiled_with_ratio(built, "inductor", ratio, "inductor")


def _compiled_with_ratio(built: Built, backend: Any, ratio: float, name: str) -> LossFn:
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
