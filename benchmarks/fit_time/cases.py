"""What is fitted: the model, its optimizer and the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """One step to fit.

    Attributes:
        title: what tables call it.
        build: depth -> (model, batch, loss function, optimizer).
        depth: number of blocks; of a trial run, `quick_depth`.
        budget_bytes: for the whole step; of a trial run, `quick_budget_bytes`. 1 for as little as
            it takes: what the first error names.
    """

    title: str
    build: Callable[[int], tuple[nn.Module, Any, Any, torch.optim.Optimizer]]
    depth: int
    quick_depth: int
    budget_bytes: int
    quick_budget_bytes: int


def _gpt2(depth: int) -> tuple[nn.Module, Any, Any, torch.optim.Optimizer]:
    from tests.models import make

    model, batch, loss_fn = make(
        "gpt2", 0, layers=depth, width=768, heads=12, vocabulary=50257, batch_size=2, length=256,
        dropout=0.0,
    )
    return model, batch, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-4)


def _blocks(
    dtype: torch.dtype, weights: str, depth: int
) -> tuple[nn.Module, Any, Any, torch.optim.Optimizer]:
    from pathlib import Path

    from benchmarks.largest.tools import LEARNING_RATE, Setting, build
    from packlight.optim import LowBit, adamw

    setting = Setting(depth, 768, None, lambda: 0, Path("."))
    model, batch, loss_fn = build(setting, dtype)
    optimizer = LowBit(model.parameters(), adamw(LEARNING_RATE), "8bit", weights=weights)
    return model, batch, loss_fn, optimizer


_GPT2 = "GPT-2 (12 x 768, sequence 256, batch 2), AdamW"

CASES = {
    "gpt2-checkpoint": Case(
        f"{_GPT2}, at checkpoint's peak", _gpt2, 12, 2, 2_290_387_552, 1_200 * MEBIBYTE
    ),
    "gpt2-smallest": Case(
        f"{_GPT2}, in as little as it takes", _gpt2, 12, 2, 1, 1
    ),
    "largest": Case(
        "251 blocks of 768 in bf16, batch 4 x 256, 8-bit optimizer",
        partial(_blocks, torch.bfloat16, "bf16-stochastic"), 251, 4,
        7_097 * MEBIBYTE, 150 * MEBIBYTE,
    ),
    # For processors whose products in bf16 are those of a loop.
    "largest-fp32": Case(
        "251 blocks of 768 in float32, batch 4 x 256, 8-bit optimizer",
        partial(_blocks, torch.float32, "fp32"), 251, 4, 10_760 * MEBIBYTE, 230 * MEBIBYTE,
    ),
}
