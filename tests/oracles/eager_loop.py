"""The training loop that `packlight.fit` stands for, in eager PyTorch, and what must agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Training:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction

    def step(
        self,
        batch: Any,
        before_update: Callable[[nn.Module], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> torch.Tensor:
        """Train one eager step and return the loss."""
        self.model.zero_grad()
        loss = self.loss_fn(self.model, batch)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if before_update is not None:
            before_update(self.model)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.model.zero_grad()
        return loss.detach().clone()


def twins(
    model: nn.Module, loss_fn: LossFunction, make_optimizer: MakeOptimizer
) -> tuple[Training, Training]:
    """Return a model and an equal one, each with an optimizer of its own."""
    models = model, copy.deepcopy(model)
    mine, eager = (Training(m, make_optimizer(m), loss_fn) for m in models)
    return mine, eager


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """Return all tensors that an optimizer keeps, by (parameter, name)."""
    state = optimizer.state_dict()["state"]
    return {(i, n): torch.as_tensor(v) for i, held in state.items() for n, v in held.items()}


def assert_same_bits(mine: Training, eager: Training) -> None:
    """Parameters, buffers and optimizer state agree in every bit, and no gradient is left."""
    ours, theirs = mine.model.state_dict(), eager.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    kept, expected = optimizer_state(mine.optimizer), optimizer_state(eager.optimizer)
    assert list(kept) == list(expected), "a checkpoint's order, too"
    assert [n for n in kept if not torch.equal(kept[n], expected[n])] == []
    assert_no_gradients(mine.model)


def assert_close(mine: Training, eager: Training, tolerance: float) -> None:
    """Parameters and buffers agree but for rounding, and no gradient is left."""
    for (name, ours), theirs in zip(
        mine.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    assert_no_gradients(mine.model)


def assert_no_gradients(model: nn.Module) -> None:
    """No parameter has one."""
    assert [n for n, p in model.named_parameters() if p.grad is not None] == []


def assert_equal_losses(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> None:
    """Losses agree in every bit."""
    assert [x.item() for x in ours] == [x.item() for x in theirs]


@contextmanager
def without_one_dnn() -> Iterator[None]:
    """Have eager PyTorch run the time steps of `nn.LSTM` one by one, as they are traced.

    oneDNN's fused kernel, which it takes else, adds up in another order.
    """
    with warnings.catch_warnings(action="ignore"):  # the switch warns of its own doing
        with torch.backends.mkldnn.flags(enabled=False):
            yield
