"""Steps that break, each beside one that is as near to it as can be and does not."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo.outcome import LossFn
from tests.zoo.families import make

NO_BREAKS, CHECKPOINTS = "without breaks", "torch.utils.checkpoint per block"
WIDTH, HEADS, LAYERS, WORDS, LENGTH, ROWS = 128, 4, 6, 256, 128, 8


@dataclass(frozen=True)
class Case:
    """A step that breaks, and its rival.

    Attributes:
        name: of the model.
        rival: `NO_BREAKS` (planned for the same budget) or `CHECKPOINTS` (eager PyTorch).
        make: returns the model, its batch and its loss; given whether it is the rival's.
    """

    name: str
    rival: str
    make: Callable[[bool], tuple[nn.Module, Any, LossFn]]


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what goes to the next block, (rows, length, width)."""
        rows, length, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, length, 3, HEADS, -1).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Gpt(nn.Module):
    """A GPT that says something behind each block, or does not.

    Args:
        is_silent: which of the two.
    """

    def __init__(self, is_silent: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.is_silent = is_silent

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (rows, length, words)."""
        x = self.words(tokens) + self.places
        for number, block in enumerate(self.blocks):
            x = block(x)
            if not self.is_silent:
                print("block", number, "has a norm of", x.detach().norm(), file=io.StringIO())
        return self.head(self.norm(x))


def _gpt(is_rival: bool) -> tuple[nn.Module, Any, LossFn]:
    torch.manual_seed(0)
    model = Gpt(is_silent=is_rival)
    return model, torch.randint(WORDS, (ROWS, LENGTH)), _next_word


def _next_word(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _family(name: str) -> Callable[[bool], tuple[nn.Module, Any, LossFn]]:
    def made(is_rival: bool) -> tuple[nn.Module, Any, LossFn]:
        model, batch, loss_fn = make(name)
        if is_rival:
            inner: Any = next(m for m in model.modules() if hasattr(m, "config"))
            inner.activation_checkpointing_enable({"use_reentrant": False})
        return model, batch, loss_fn

    return made


FAMILIES = ("detr", "led", "longformer", "wav2vec2_ctc")
CASES = {
    "gpt": Case("gpt", NO_BREAKS, _gpt),
    **{name: Case(name, CHECKPOINTS, _family(name)) for name in FAMILIES},
}
