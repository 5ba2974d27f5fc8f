"""A character-level GPT on tiny Shakespeare.

    packlight train examples/char_gpt.py --budget 80MiB --steps 300

A plain decoder-only transformer with learned positions, pre-norm blocks and dropout. Most of what
its training step holds is activations: 14 MiB of parameters and optimizer state are beside 170 MiB
that the backward waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TEXT = Path(__file__).parent / "data" / "tinyshakespeare.txt"
NUM_LAYERS = 6
NUM_HEADS = 4
WIDTH = 128
CONTEXT = 64
BATCH = 48
DROPOUT = 0.1
LEARNING_RATE = 4e-3


class Characters:
    """The characters of a text, numbered in sorted order, and the text as their numbers."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        self._number = {character: i for i, character in enumerate(self.alphabet)}
        tokens = torch.tensor([self._number[character] for character in text])
        split = int(0.9 * len(tokens))
        self.splits = {"train": tokens[:split], "validation": tokens[split:]}

    def encode(self, text: str) -> torch.Tensor:
        """Return the numbers of a text, int64 [len(text)]."""
        return torch.tensor([self._number[character] for character in text])

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the text of int64 [length] numbers."""
        return "".join(self.alphabet[i] for i in tokens.tolist())


CHARACTERS = Characters(TEXT.read_text(encoding="utf-8"))


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] for the same."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream after a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] for the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class CharGPT(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, num_characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(num_characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_characters, bias=False)
        # Every character is about equally likely at first.
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, characters] for int64 [batch, length]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model() -> nn.Module:
    """Return an untrained model."""
    return CharGPT(len(CHARACTERS.alphabet))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy in nats per character."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))


def batches(split: str = "train") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (characters, the ones that follow), int64 [batch, context] each, from random places."""
    tokens = CHARACTERS.splits[split]
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH, 1))
        yield tokens[starts + offsets], tokens[starts + offsets + 1]


def tokens_per_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Return the number of characters that a batch trains on."""
    return batch[0].numel()


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: str = "\nROMEO:\n",
    num_characters: int = 400,
    temperature: float = 0.8,
) -> str:
    """Return the prompt and what the model writes after it."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    tokens = CHARACTERS.encode(prompt)[None].to(device)
    for _ in range(num_characters):
        logits = model(tokens[:, -CONTEXT:])[:, -1] / temperature
        following = torch.multinomial(F.softmax(logits, dim=-1), 1)
        tokens = torch.cat([tokens, following], dim=1)
    model.train(was_training)
    return CHARACTERS.decode(tokens[0])
