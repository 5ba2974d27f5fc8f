"""Hugging Face's GPT-2, random weights, on the bytes of tiny Shakespeare, in one's own loop.

    python examples/hf_gpt2.py --budget 200MiB --steps 20
    packlight plan examples/hf_gpt2.py --budget 250MiB

In a loop of one's own, `torch.compile` with the backend "packlight" is all that changes. Its budget
covers what forward and backward allocate; parameters and optimizer state are there already. The
functions below the loop are what the `packlight` command uses; there the budget is for everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import packlight

TEXT = Path(__file__).parent / "data" / "tinyshakespeare.txt"
BATCH = 8
CONTEXT = 256
CONFIG = GPT2Config(
    vocab_size=256,
    n_positions=CONTEXT,
    n_embd=192,
    n_layer=6,
    n_head=6,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=False,
)


def main() -> None:
    """Train for a few steps and compare the measured peak with the budget."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="150MiB", help="for what forward and backward allocate")
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
    """Return GPT-2 with random weights, in training mode."""
    return GPT2LMHeadModel(CONFIG).train()


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss that the model computes for its labels."""
    return model(**batch).loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches(split: str = "train") -> Iterator[dict[str, torch.Tensor]]:
    """Yield input_ids and labels, int64 [batch, context]; the model shifts the labels itself."""
    tokens = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    boundary = int(0.9 * len(tokens))
    tokens = tokens[:boundary] if split == "train" else tokens[boundary:]
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        input_ids = tokens[starts + offsets]
        yield {"input_ids": input_ids, "labels": input_ids}


def tokens_per_batch(batch: dict[str, torch.Tensor]) -> int:
    """Return the number of bytes of text that a batch trains on."""
    return batch["input_ids"].numel()


if __name__ == "__main__":
    main()
