"""The models that the benchmark trains, with optimizers and budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.models import Built, adamw, momentum_sgd, plain_sgd, to_device

PERCENTS = (100, 90, 80, 70, 60, 50, 45, 40, 35, 30, 25, 20, 15, 10)
VARIANT_PERCENTS = (70, 50, 35)
QUICK_VARIANT_PERCENTS = (60,)


@dataclass(frozen=True)
class Case(models.Case):
    """One model, batch and optimizer.

    Attributes:
        percents: budgets in percent of the plain eager step's peak, downwards.
        quick_percents: the same for a trial run.
        variant_percents: those at which fewer moves are allowed, too.
        variants: names of `measure.VARIANTS` to run there.
        offload_percents, offload_variants: the same with a folder to offload to.
        above_parameters_mib: further budgets: so many MiB and the parameters.
        microbatches_by_hand: into how many an eager step is cut for comparison; 1 for not at all.
        num_trained_steps: of a training run beside eager, at `trained_settings`.
    """

    percents: tuple[int, ...] = PERCENTS
    quick_percents: tuple[int, ...] = (100, 60, 35, 20)
    variant_percents: tuple[int, ...] = VARIANT_PERCENTS
    variants: tuple[str, ...] = (
        "recompute only", "recompute + update-in-backward", "recompute + microbatch",
    )
    offload_percents: tuple[int, ...] = VARIANT_PERCENTS
    offload_variants: tuple[str, ...] = (
        "recompute only", "offload alone", "recompute + offload", "all moves + offload",
    )
    above_parameters_mib: tuple[int, ...] = ()
    microbatches_by_hand: int = 4
    num_trained_steps: int = 0
    trained_settings: tuple[str, ...] = ()

    def build(self, quick: bool, device: str, seed: int) -> Built:
        """Return the model in training mode, its batch, its loss and its blocks."""
        if self.family != "char_gpt":
            return super().build(quick, device, seed)
        from examples import char_gpt

        torch.manual_seed(seed)
        return self.built(
            char_gpt.model().train(), next(char_gpt.batches()), char_gpt.loss, device
        )

    def batches(self, split: str, count: int, device: str, seed: int) -> Iterator[Any]:
        """Return the same batches for every run; only examples with data have any."""
        from examples import char_gpt

        torch.manual_seed(seed)
        return iter([to_device(b, device) for b in islice(char_gpt.batches(split), count)])


def _char_gpt_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from examples import char_gpt

    return char_gpt.optimizer(model)


_REFERENCE_QUICK = {"layers": 4, "width": 96, "length": 64, "vocabulary": 512}

CASES = {
    case.name: case
    for case in (
        Case(
            "reference_gpt",
            "reference GPT (12 x 384, sequence 256, batch 8, vocabulary 8192), AdamW",
            "reference_gpt", adamw, {}, _REFERENCE_QUICK, "blocks",
            percents=(100, 70, 50, 40, 35),
            variants=("recompute only", "recompute + microbatch", "microbatch alone"),
            # 41% is the least that recomputation alone can do.
            variant_percents=(70, 50, 43), offload_percents=(70, 50, 43, 35),
        ),
        Case(
            "reference_gpt_sgd",
            "reference GPT (12 x 384, sequence 256, batch 8, vocabulary 8192), SGD without state",
            "reference_gpt", plain_sgd, {}, _REFERENCE_QUICK, "blocks",
            percents=(100, 50), variant_percents=(50,),
            above_parameters_mib=(234, 150),
        ),
        Case(
            "gpt2", "GPT-2 (12 x 768, sequence 512, batch 4, no dropout), AdamW", "gpt2", adamw,
            {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "batch_size": 4,
             "length": 512, "dropout": 0.0},
            {"dropout": 0.0},
            num_rounds=2, percents=(100, 70, 50, 40), variants=(),
            # Parameters and optimizer state are 31% of the plain peak.
            offload_percents=(25,), offload_variants=("all moves + offload",),
        ),
        Case(
            "t5", "T5 small (6 + 6 x 512, sequences 128 and 64, batch 8, no dropout), AdamW", "t5",
            adamw,
            {"layers": 6, "width": 512, "heads": 8, "mlp_width": 2048, "vocabulary": 32128,
             "batch_size": 8, "length": 128, "target_length": 64, "dropout": 0.0},
            {"dropout": 0.0}, percents=(100, 80, 60, 50, 40), variants=(),
        ),
        Case(
            "resnet50", "ResNet-50 (224 x 224, batch 16), SGD with momentum", "resnet50",
            momentum_sgd, {"batch_size": 16, "side": 224}, {"batch_size": 2, "side": 64}, "blocks",
            percents=(100, 80, 60, 40, 30, 20), variants=(), microbatches_by_hand=1,
        ),
        Case(
            "char_gpt", "examples/char_gpt.py (6 x 128, sequence 64, batch 48, dropout 0.1), AdamW",
            "char_gpt", _char_gpt_optimizer, blocks="blocks",
            percents=(100, 50, 35, 20), variants=(), num_trained_steps=200,
            trained_settings=("50%", "smallest"),
        ),
    )
}
