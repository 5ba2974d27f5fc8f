"""The models that everyone trains, with the settings that their rivals are run with."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import models
from benchmarks.models import adamw, momentum_sgd


@dataclass(frozen=True)
class Case(models.Case):
    """One model, batch and optimizer.

    Attributes:
        segments: how many segments `checkpoint_sequential` gets; none where blocks are no chain.
        memory_budgets: values of `activation_memory_budget` to run with eager kernels.
        inductor_budgets: the same with inductor's own.
        microbatches: into how many a step is cut by hand; 1 for not at all.
    """

    segments: tuple[int, ...] = (2, 4)
    memory_budgets: tuple[float, ...] = (0.7, 0.4, 0.2, 0.0)
    inductor_budgets: tuple[float, ...] = (1.0, 0.5)
    microbatches: int = 1


_BASE = {"layers": 12, "width": 768, "heads": 12}

CASES = {
    case.name: case
    for case in (
        Case(
            "gpt2", "GPT-2 (12 x 768, sequence 256, batch 2, no dropout), AdamW", "gpt2", adamw,
            {**_BASE, "vocabulary": 50257, "batch_size": 2, "length": 256, "dropout": 0.0},
            {"layers": 2, "dropout": 0.0}, "transformer.h", microbatches=2,
        ),
        Case(
            "bert", "BERT base (12 x 768, sequence 128, batch 4, dropout 0.1), AdamW", "bert",
            adamw, {**_BASE, "vocabulary": 30522, "batch_size": 4, "length": 128}, {"layers": 2},
            "bert.encoder.layer", microbatches=4,
        ),
        Case(
            "vit", "ViT-B/16 (12 x 768, 224 x 224, batch 4, no dropout), AdamW", "vit", adamw,
            {**_BASE, "side": 224, "patch": 16, "batch_size": 4, "num_labels": 1000,
             "dropout": 0.0},
            {"layers": 2, "dropout": 0.0}, "vit.layers", microbatches=4,
        ),
        Case(
            "resnet50", "ResNet-50 (224 x 224, batch 8), SGD with momentum", "resnet50",
            momentum_sgd, {"batch_size": 8, "side": 224}, {"batch_size": 2, "side": 64}, "blocks",
        ),
        Case(
            "wrn", "WRN-28-2 (32 x 32, batch 100, dropout 0.1), SGD with momentum", "wrn",
            momentum_sgd, {"batch_size": 100}, {"batch_size": 8}, "blocks",
        ),
        Case(
            "unet", "U-Net (4 levels, 32 to 256 wide, 256 x 256, batch 4), SGD with momentum",
            "unet", momentum_sgd, {"wide": 32, "side": 256, "batch_size": 4}, {}, "down merge",
            segments=(),
        ),
    )
}
