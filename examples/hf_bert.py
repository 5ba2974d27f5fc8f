"""Hugging Face's BERT, random weights, on masked bytes of tiny Shakespeare, in one's own loop.

    python examples/hf_bert.py --budget 120MiB --steps 20
    packlight plan examples/hf_bert.py --budget 200MiB

As in hf_gpt2.py: `torch.compile` with the backend "packlight" is all that changes in the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import packlight

TEXT = Path(__file__).parent / "data" / "tinyshakespeare.txt"
BATCH = 16
CONTEXT = 128
MASK = 256
MASKED_SHARE = 0.15
IGNORED = -100
CONFIG = BertConfig(
    vocab_size=257,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=6,
    intermediate_size=768,
    max_position_embeddings=CONTEXT,
)


def main() -> None:
    """Train for a few steps and compare the measured peak with the budget."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="120MiB", help="for what forward and backward allocate")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = model()
    updates = optimizer(network)
    compiled = torch.compile(network, backend="packlight", options={"budget": arguments.budget})
    data = batches()

    def forward_and_backward() -> torch.Tensor:
        value = loss(compiled, next(data))
        value.backward()
        return value.detach()

    for index in range(1, arguments.steps + 1):
        # The first step captures and plans, so the second one is measured.
        if index == 2:
            peak = packlight.measure_peak(forward_and_backward)
            value = peak.result
            print(f"measured peak {peak.peak_bytes / 2**20:.1f} MiB, budget {arguments.budget}")
        else:
            value = forward_and_backward()
        updates.step()
        updates.zero_grad(set_to_none=True)
        print(f"step {index}: loss {value.item():.4f}", flush=True)


def model() -> nn.Module:
    """Return BERT with random weights, in training mode."""
    return BertForMaskedLM(CONFIG).train()


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss that the model computes at the masked places."""
    return model(**batch).loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=5e-4)


def batches(split: str = "train") -> Iterator[dict[str, torch.Tensor]]:
    """Yield input_ids with masked bytes, and labels at those places, int64 [batch, context]."""
    tokens = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    boundary = int(0.9 * len(tokens))
    tokens = tokens[:boundary] if split == "train" else tokens[boundary:]
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        text = tokens[starts + offsets]
        is_masked = torch.rand(text.shape) < MASKED_SHARE
        yield {
            "input_ids": text.masked_fill(is_masked, MASK),
            "labels": text.masked_fill(~is_masked, IGNORED),
        }


def tokens_per_batch(batch: dict[str, torch.Tensor]) -> int:
    """Return the number of bytes of text in a batch."""
    return batch["input_ids"].numel()


if __name__ == "__main__":
    main()
