"""The models that the benchmark trains, with optimizers and budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.spine.cases import CASES as SPINE_CASES
from benchmarks.spine.cases import Built
from tests.models import make

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
PERCENTS = (100, 90, 80, 70, 60, 50, 45, 40, 35, 30, 25, 20, 15, 10)
VARIANT_PERCENTS = (70, 50, 35)
QUICK_VARIANT_PERCENTS = (60,)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as torch gives it, with a small learning rate."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD without state."""
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """One model, batch and optimizer.

    Attributes:
        name: what the results and the command line call it.
        title: what the tables call it.
        family: its maker in `tests.models`, or the example it is.
        optimizer: makes the optimizer.
        sizes: arguments of the maker.
        quick_sizes: the same for a trial run.
        blocks: the path of the module list that is checkpointed by hand; "" for none.
        num_rounds: how often every cell is timed.
        percents: budgets in percent of the plain eager step's peak, downwards.
        quick_percents: the same for a trial run.
        variant_percents: those at which fewer moves are allowed, too.
        variants: names of `measure.VARIANTS` to run there.
        offload_percents, offload_variants: the same with a folder to offload to.
        above_parameters_mib: further budgets: so many MiB and the parameters.
        microbatches_by_hand: into how many an eager step is cut for comparison; 1 for not at all.
        num_trained_steps: of a training run beside eager, at `trained_settings`.
    """

    name: str
    title: str
    family: str
    optimizer: MakeOptimizer
    sizes: dict[str, Any] = field(default_factory=dict)
    quick_sizes: dict[str, Any] = field(default_factory=dict)
    blocks: str = ""
    num_rounds: int = 3
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
        if self.family == "char_gpt":
            from examples import char_gpt

            torch.manual_seed(seed)
            model, loss_fn = char_gpt.model().train(), char_gpt.loss
            batch: Any = next(char_gpt.batches())
        else:
            sizes = self.quick_sizes if quick else self.sizes
            model, batch, loss_fn = make(self.family, seed, **sizes)
        model.to(device)
        blocks = list(model.get_submodule(self.blocks)) if self.blocks else []  # type: ignore
        return Built(model, _on(device, batch), loss_fn, blocks)

    def batches(self, split: str, count: int, device: str, seed: int) -> Iterator[Any]:
        """Return the same batches for every run; only examples with data have any."""
        from examples import char_gpt

        torch.manual_seed(seed)
        return iter([_on(device, b) for b in islice(char_gpt.batches(split), count)])


def _char_gpt_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from examples import char_gpt

    return char_gpt.optimizer(model)


def _on(device: str, batch: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch)


_REFERENCE = SPINE_CASES["reference_gpt"]

CASES = {
    case.name: case
    for case in (
        Case(
            "reference_gpt",
            "reference GPT (12 x 384, sequence 256, batch 8, vocabulary 8192), AdamW",
            "reference_gpt", adamw, _REFERENCE.sizes, _REFERENCE.quick_sizes, _REFERENCE.blocks,
            percents=(100, 70, 50, 40, 35),
            variants=("recompute only", "recompute + microbatch", "microbatch alone"),
            # 41% is the least that recomputation alone can do.
            variant_percents=(70, 50, 43), offload_percents=(70, 50, 43, 35),
        ),
        Case(
            "reference_gpt_sgd",
            "reference GPT (12 x 384, sequence 256, batch 8, vocabulary 8192), SGD without state",
            "reference_gpt", plain_sgd, _REFERENCE.sizes, _REFERENCE.quick_sizes,
            _REFERENCE.blocks, percents=(100, 50), variant_percents=(50,),
            above_parameters_mib=(234, 150),
        ),
        Case(
            "gpt2", "GPT-2 (12 x 768, sequence 512, batch 4, no dropout), AdamW", "gpt2", adamw,
            {**SPINE_CASES["gpt2"].sizes, "batch_size": 4, "dropout": 0.0}, {"dropout": 0.0},
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
