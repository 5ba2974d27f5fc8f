"""Hyper-parameters of a character-level GPT on tiny Shakespeare, searched in one limit of memory.

    packlight search examples/char_gpt_search.py --memory 1GiB --trials 20 --workers 2

`space` names what is searched; the other functions take those of its values that they have
arguments for. With the defaults, the same file can be profiled, planned and trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from char_gpt import CHARACTERS, CONTEXT
from torch import nn

WIDTH_OF_HEAD = 16


def space(trial: Any) -> dict[str, Any]:
    """Return a trial's values, asked of an `optuna.Trial`."""
    return {
        "width": trial.suggest_int("width", 32, 256, step=32),
        "num_layers": trial.suggest_int("num_layers", 1, 6),
        "batch": trial.suggest_categorical("batch", [8, 16, 32, 64]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
    }


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each added to the stream after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] for the same."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, WIDTH_OF_HEAD))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(len(CHARACTERS.alphabet), width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS.alphabet)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, characters] for int64 [batch, length]."""
        return self.head(self.blocks(self.token(tokens) + self.position[: tokens.shape[1]]))


def model(width: int = 128, num_layers: int = 4) -> nn.Module:
    """Return an untrained model."""
    return GPT(width, num_layers)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy in nats per character."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def optimizer(model: nn.Module, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate)


def batches(
    split: str = "train", batch: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (characters, the ones that follow), int64 [batch, context] each, from random places."""
    tokens = CHARACTERS.splits[split]
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (batch, 1))
        yield tokens[starts + offsets], tokens[starts + offsets + 1]
