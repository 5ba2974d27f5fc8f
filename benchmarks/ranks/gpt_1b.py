"""A GPT of a billion parameters, for `packlight plan`: each of 512 ranks has one sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tests.models import ReferenceGPT, call_pair

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY, ROWS = 18, 2048, 16, 512, 50304, 512

loss = call_pair


def model() -> nn.Module:
    """Return 1.1 billion parameters."""
    return ReferenceGPT(LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def batches(split: str = "train") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and those that follow them."""
    while True:
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
        yield tokens, tokens.roll(-1, 1)
