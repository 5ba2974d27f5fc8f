"""Losses whose plain `assert` statements pytest does not rewrite, as it does in tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Batch = dict[str, torch.Tensor]


def asserted(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Classification that asserts things of its logits."""
    logits = model(batch["x"])
    assert torch.isfinite(logits).all(), "not finite"
    torch._assert_async((logits.abs() < batch["limit"]).all(), "too large")
    return F.cross_entropy(logits, batch["y"])
