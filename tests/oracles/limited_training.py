"""A training run whose process may allocate no more than a budget: run by tests/test_hard_limit.py.

    python -m tests.oracles.limited_training eager|packlight BUDGET_BYTES|none SLACK_BYTES

The limit is the kernel's (RLIMIT_DATA: all private writable memory, Python's own included), set
once torch and packlight are loaded and have trained a tiny model, before the real model exists.
Prints losses as JSON, or exits with 3 where torch found no memory.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import packlight

NUM_STEPS = 3
NUM_ROWS, WIDTH, NUM_BLOCKS = 32_768, 64, 8
OUT_OF_MEMORY = 3


class Block(nn.Module):
    """A residual block; four activations of the batch's size and larger stay for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train(how: str, num_blocks: int, num_rows: int, budget_bytes: int | None) -> list[float]:
    """Make a model and a batch and train; return the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(num_blocks)], nn.Linear(WIDTH, 8))
    batch = torch.randn(num_rows, WIDTH), torch.randint(0, 8, (num_rows,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step: Any = None
    if how == "packlight":
        moves = ("update-in-backward",)
        step = packlight.fit(
            model, loss_fn, optimizer, batch, budget_bytes, moves=moves, progress=False
        )
    losses = []
    for _ in range(NUM_STEPS):
        if step is not None:
            losses.append(step(batch).item())
            continue
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        del loss
    return losses


def writable_bytes() -> int:
    """Return what the kernel compares with RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def main() -> None:
    """See the head of this file."""
    how, budget, slack = sys.argv[1:]
    torch.set_num_threads(1)
    for each in ("eager", "packlight"):
        train(each, num_blocks=1, num_rows=64, budget_bytes=None)
    gc.collect()
    if budget != "none":
        limit = writable_bytes() + int(budget) + int(slack)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        losses = train(how, NUM_BLOCKS, NUM_ROWS, None if budget == "none" else int(budget))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            print(f"out of memory: {error}", file=sys.stderr)
            sys.exit(OUT_OF_MEMORY)
        raise
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
