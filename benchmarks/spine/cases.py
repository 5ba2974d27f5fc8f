"""The models that the benchmark trains, and how often each is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.common import MEBIBYTE
from benchmarks.models import Built
from tests.models import make


@dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
        name: what the results and the command line call it.
        title: what the tables call it.
        family: its maker in `tests.models`.
        sizes: arguments of the maker.
        quick_sizes: the same for a trial run.
        blocks: the path of the module list that peers checkpoint block by block.
        num_rounds: how often every cell is timed.
        budgets_bytes: budgets to plan for besides the rivals' peaks.
        segments: how many segments `checkpoint_sequential` gets.
        memory_budgets: values of torch's `activation_memory_budget`.
        inductor_budgets: values of `activation_memory_budget` to run with inductor's own kernels.
    """

    name: str
    title: str
    family: str
    sizes: dict[str, Any]
    quick_sizes: dict[str, Any]
    blocks: str
    num_rounds: int
    budgets_bytes: tuple[int, ...] = ()
    segments: tuple[int, ...] = (3,)
    memory_budgets: tuple[float, ...] = (0.7, 0.5, 0.3, 0.1, 0.0)
    inductor_budgets: tuple[float, ...] = ()

    def build(self, quick: bool, device: str, seed: int) -> Built:
        """Return the model in training mode, its batch and its loss."""
        sizes = self.quick_sizes if quick else self.sizes
        model, batch, loss_fn = make(self.family, seed, **sizes)
        model.to(device)
        batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
        return Built(model, batch, loss_fn, self.blocks)


CASES = {
    case.name: case
    for case in (
        Case(
            "reference_gpt", "reference GPT (12 x 384, sequence 256, batch 8, vocabulary 8192)",
            "reference_gpt", {}, {"layers": 4, "width": 96, "length": 64, "vocabulary": 512},
            "blocks", 5,
            budgets_bytes=tuple(m * MEBIBYTE for m in (477, 351, 307, 234, 205)),
            segments=(2, 3, 4), inductor_budgets=(1.0, 0.5),
        ),
        Case(
            "gpt2", "GPT-2 (12 x 768, sequence 512, batch 2, dropout 0.1)", "gpt2",
            {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "batch_size": 2,
             "length": 512},
            {}, "transformer.h", 3, segments=(), memory_budgets=(0.5, 0.1),
        ),
        Case(
            "bert", "BERT base (12 x 768, sequence 128, batch 8, dropout 0.1)", "bert",
            {"layers": 12, "width": 768, "heads": 12, "vocabulary": 30522, "batch_size": 8,
             "length": 128},
            {}, "bert.encoder.layer", 3, segments=(), memory_budgets=(0.5, 0.1),
        ),
        Case(
            "resnet50", "ResNet-50 (224 x 224, batch 8)", "resnet50",
            {"batch_size": 8, "side": 224}, {"batch_size": 2, "side": 64}, "blocks", 3,
            segments=(2, 4),
        ),
        Case(
            "wrn", "WRN-28-2 (32 x 32, batch 100, dropout 0.1)", "wrn",
            {"batch_size": 100}, {"batch_size": 8}, "blocks", 5, segments=(2, 4),
        ),
    )
}
