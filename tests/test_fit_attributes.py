"""Forwards that assign tensors to attributes: `fit` leaves there what the eager loop leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError, UnsupportedModelError
from tests.models import classify
from tests.oracles.eager_loop import assert_equal_losses, assert_same_bits, twins

EXACT = ("update-in-backward", "pack")
ROWS, WIDTH = 64, 32


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Budgets found in one test do not depend on times seen in another."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Remembering(nn.Module):
    """Counts its calls, and remembers what it saw in attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.last_hidden: torch.Tensor | None = None
        self.last_loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1  # the same tensor, changed, and assigned to itself
        for layer in self.layers:
            x = F.gelu(layer(x))
        self.last_hidden = x.detach()
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)  # another tensor
        return (x - self.centre) / self.num_calls.sqrt()


def remembering_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss = classify(model, batch)
    model.last_loss = loss.detach()
    return loss


def batch_of(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, WIDTH, (ROWS,), generator=generator)
    return torch.randn(ROWS, WIDTH, generator=generator), targets


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("is_tight", [False, True])
def test_attributes_hold_after_each_step_what_they_hold_in_eager(is_tight: bool) -> None:
    torch.manual_seed(0)
    mine, eager = twins(Remembering(), remembering_loss, adamw)
    budget = None
    if is_tight:
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.plan(
                mine.model, mine.loss_fn, mine.optimizer, batch_of(), 1, moves=EXACT,
                progress=False,
            )
        budget = caught.value.smallest_bytes
    step = packlight.fit(
        mine.model, mine.loss_fn, mine.optimizer, batch_of(), budget, moves=EXACT, progress=False
    )
    counter = mine.model.num_calls
    for index in range(4):
        batch = batch_of(index)
        measured = step.measured(batch)
        assert_equal_losses([measured.loss], [eager.step(batch)])
        assert measured.peak_bytes <= step.peak_bytes
        assert budget is None or measured.peak_bytes <= budget
        assert_same_bits(mine, eager)
        for name in ("last_hidden", "last_loss"):
            assert torch.equal(getattr(mine.model, name), getattr(eager.model, name)), name
    assert mine.model.num_calls is counter, "a buffer that is changed stays the same tensor"


class KeepsView(Remembering):
    """A part of a buffer that is changed, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.centre.mul_(0.9)
        self.last_hidden = self.centre[2:]
        return self.layers[0](x)


def test_attributes_that_outlive_the_step_otherwise_are_refused() -> None:
    mine, _ = twins(KeepsView(), classify, adamw)
    with pytest.raises(UnsupportedModelError, match=r"\(30,\).*\n.*clone"):
        packlight.fit(mine.model, classify, mine.optimizer, batch_of(), progress=False)


def test_a_changed_buffer_that_is_assigned_to_itself_is_held_once() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(2048, 16), nn.GELU(), nn.Linear(16, WIDTH)]
    # Its power iteration writes into buffers of 2048 numbers, which the weight then depends on.
    layers[0] = nn.utils.parametrizations.spectral_norm(layers[0])
    mine, eager = twins(nn.Sequential(*layers), classify, adamw)
    batch = torch.randn(4, 2048), torch.randint(0, WIDTH, (4,))
    options = {"moves": EXACT, "progress": False}
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(mine.model, classify, mine.optimizer, batch, 1, **options)
    budget = caught.value.smallest_bytes
    step = packlight.fit(mine.model, classify, mine.optimizer, batch, budget, **options)
    for _ in range(2):
        measured = step.measured(batch)
        assert_equal_losses([measured.loss], [eager.step(batch)])
        assert measured.peak_bytes <= budget
    assert_same_bits(mine, eager)
