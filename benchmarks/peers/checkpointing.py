"""Activation checkpointing as users write it: blocks' forwards are replaced while the loss runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from benchmarks.models import Built, LossFn

_ATEN = torch.ops.aten
# The usual policy: what is costly to compute again, matrix products and attention, is kept.
_SAVED = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
}


def per_block(built: Built, every: int = 1) -> LossFn:
    """Return the loss with every block, or every second, recomputed in the backward."""
    return _with_forwards(
        built,
        {
            b: functools.partial(checkpoint, b.forward, use_reentrant=False)
            for b in built.blocks[::every]
        },
    )


def selective(built: Built) -> LossFn:
    """Return the loss with what is cheap in each block recomputed in the backward."""

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


def in_segments(built: Built, num_segments: int) -> LossFn:
    """Return the loss with the blocks, a chain, cut into segments of which all but one recompute.

    The first block runs the whole chain, the others pass the stream through.
    """
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
