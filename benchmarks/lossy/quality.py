"""A character GPT trained with one approximation everywhere: loss on text that it has not seen.

Few-bit: all GELUs. Packed: the inputs of all linear layers, which is what randomized ones sketch.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import lossy
from packlight.lossy.packing import pack_values, unpack_values

CASES = (
    "exact", "few-bit 3", "few-bit 2", "few-bit 1", "packed 8", "packed 4", "packed 2",
    "randomized 0.5", "randomized 0.2", "randomized 0.1",
)
WIDTH, LAYERS, HEADS, LENGTH, BATCH = 96, 3, 4, 64, 16


class PackedLinear(nn.Linear):
    """A linear layer whose input is kept in few bits."""

    bits = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weight, plus the bias."""
        return _Packed.apply(x, self.weight, self.bias, self.bits)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, bits: int) -> torch.Tensor:
        x = x.contiguous()
        ctx.layout = bits, x.shape, x.stride(), x.dtype
        ctx.save_for_backward(weight, pack_values(x, bits, 0, x.stride()))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        weight, packed = ctx.saved_tensors
        (gradient,) = gradients
        x = unpack_values(packed, *ctx.layout).flatten(0, -2)
        rows = gradient.flatten(0, -2)
        return gradient @ weight, rows.T @ x, rows.sum(0), None


class Block(nn.Module):
    """Attention and an MLP, both added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, width)."""
        q, k, v = self.qkv(self.first(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.second(x))


class CharGPT(nn.Module):
    """A small GPT over bytes of text."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of each next character of (batch, length + 1) characters."""
        x = self.tokens(text[:, :-1]) + self.places.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def trained(case: str, seed: int, num_steps: int, text: str) -> dict[str, float]:
    """Return the validation loss after training, a step's peak and its median time."""
    alphabet = sorted(set(text))
    place = {character: index for index, character in enumerate(alphabet)}
    data = torch.tensor([place[character] for character in text])
    training, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    torch.manual_seed(seed)
    model = CharGPT(len(alphabet))
    _approximate(model.blocks, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, num_steps)

    def step() -> None:
        optimizer.zero_grad()
        model(_rows(training, BATCH)).backward()
        optimizer.step()
        schedule.step()

    seconds = []
    for index in range(num_steps):
        if index == num_steps - 1:
            peak_bytes = packlight.measure_peak(step).peak_bytes
            break
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [float(model(_rows(held_out, 64))) for _ in range(20)]
    return {
        "validation_loss": round(sum(losses) / len(losses), 4),
        "peak_bytes": peak_bytes,
        "step_seconds": round(sorted(seconds)[len(seconds) // 2], 5),
    }


def _approximate(model: nn.Module, case: str) -> None:
    technique, _, amount = case.partition(" ")
    if technique == "few-bit":
        lossy.few_bit_activations(model, int(amount))
    elif technique == "randomized":
        lossy.randomized_linears(model, float(amount))
    elif technique == "packed":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = PackedLinear
                module.bits = int(amount)


def _rows(data: torch.Tensor, count: int) -> torch.Tensor:
    starts = torch.randint(len(data) - LENGTH - 1, (count,))
    return torch.stack([data[start : start + LENGTH + 1] for start in starts])
