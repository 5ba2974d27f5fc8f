"""Margin losses of several classes are traced as the calls that eager PyTorch makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import packlight
from packlight.backend import PacklightBackend
from tests.oracles.eager_loop import assert_same_bits, twins

ROWS, CLASSES = 6, 5
# Behind the first -1, places count for nothing: they are no class 0.
LABELS = torch.tensor([[3, 1, -1, 0, 0], [0, -1, 4, 4, 4], [-1] * 5] * 2)
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "several labels": lambda scores: F.multilabel_margin_loss(scores, LABELS),
    "each row": lambda scores: F.multilabel_margin_loss(scores, LABELS, reduction="none").sum(),
    "one label": lambda scores: F.multi_margin_loss(scores, torch.arange(ROWS) % CLASSES),
    "squared": lambda scores: F.multi_margin_loss(
        scores, torch.arange(ROWS) % CLASSES, p=2, weight=torch.arange(CLASSES) + 0.5
    ),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_updates_are_eagers(name: str) -> None:
    torch.manual_seed(0)
    batches = torch.randn(3, ROWS, 4)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](model(x))

    mine, eager = twins(nn.Linear(4, CLASSES), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batches[0], moves=(), progress=False
    )
    for x in batches:
        assert step(x).item() == eager.step(x).item()
    assert_same_bits(mine, eager)


def test_the_backends_gradients_are_eagers_and_other_backends_stay_as_they_were() -> None:
    torch.manual_seed(0)
    scores = torch.randn(ROWS, CLASSES, requires_grad=True)
    loss_fn = LOSSES["several labels"]

    def gradient(function: Callable[..., Any]) -> torch.Tensor:
        (found,) = torch.autograd.grad(function(scores), scores)
        return found

    kernels = dict(torch.ops.aten.multilabel_margin_loss_forward.default.py_kernels)
    compiled = torch.compile(loss_fn, backend=PacklightBackend(progress=False))
    assert torch.equal(gradient(compiled), gradient(loss_fn))
    assert torch.ops.aten.multilabel_margin_loss_forward.default.py_kernels == kernels
