"""The rows of the table: what each does to take less memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.models import in_bfloat16
from examples import wrn_cifar10
from packlight.optim import LowBit, sgd

MEGABYTE = 10**6  # the paper's


@dataclass(frozen=True)
class Paper:
    """What the paper has in the same row.

    Attributes:
        megabytes: of memory, counted.
        accuracy: on the test set after 200 epochs, in percent.
    """

    megabytes: float
    accuracy: float


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: for the command line.
        title: for the table.
        paper: its row there, None for those that it does not have.
        dtype: of weights, gradients and activations; batch norms stay float32.
        states: of the momentum, where weights are in low precision.
        budget_bytes: for everything that a step holds; None for none.
        is_eager: a plain PyTorch loop.
        allow: approximate techniques.
    """

    name: str
    title: str
    paper: Paper | None
    dtype: torch.dtype
    states: str = "bf16"
    budget_bytes: int | None = None
    is_eager: bool = False
    allow: frozenset[str] = frozenset()

    def model(self, seed: int) -> nn.Module:
        """Return the model as it starts, in training mode."""
        torch.manual_seed(seed)
        model = wrn_cifar10.model().train()
        if self.dtype is not torch.float32:
            in_bfloat16(model)
        return model

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Return SGD with Nesterov momentum, as in the paper, in the row's precision."""
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        if self.dtype is torch.float32:
            return torch.optim.SGD(model.parameters(), lr=learning_rate, **settings)  # type: ignore[arg-type]
        norms = [p for p in model.parameters() if p.dtype is torch.float32]
        others = [p for p in model.parameters() if p.dtype is not torch.float32]
        groups = [
            {"params": others, "weights": "bf16-stochastic"},
            {"params": norms, "weights": "fp32"},
        ]
        return LowBit(groups, sgd(lr=learning_rate, **settings), states=self.states)  # type: ignore[arg-type]

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch in the row's precision."""
        if self.dtype is torch.float32:
            return images, labels
        return images.to(self.dtype, memory_format=torch.channels_last), labels


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy, taken in float32."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images).float(), labels)


_PLAIN, _LOW = torch.float32, torch.bfloat16
_MICROBATCHES = frozenset({"microbatch-batch-norm"})

ROWS = {
    row.name: row
    for row in (
        Row("fp32", "fp32, nothing recomputed", Paper(404.8, 94.37), _PLAIN, is_eager=True),
        Row("fp32-fit", "fp32, planned, no budget", None, _PLAIN),
        Row(
            "bf16", "bf16 throughout, recomputation", Paper(42.6, 94.43), _LOW,
            budget_bytes=int(42.6 * MEGABYTE),
        ),
        Row(
            "bf16-microbatch", "the same with 8-bit momentum and microbatches", Paper(12.2, 94.28),
            _LOW, "8bit", int(12.2 * MEGABYTE), allow=_MICROBATCHES,
        ),
        Row(
            "bf16-10mb", "the same in 10 MB", None, _LOW, "8bit", 10 * MEGABYTE,
            allow=_MICROBATCHES,
        ),
        Row(
            "bf16-smallest", "the same in as little as it takes", None, _LOW, "8bit", 1,
            allow=_MICROBATCHES,
        ),
    )
}
