"""Fused kernels in the pieces of a loss that breaks, in both doors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import packlight
from packlight.backend import PacklightBackend
from packlight.capture.pieces import Piece
from packlight.costs.measure import FUSED_NAMESPACE
from packlight.moves.fuse import groups as fuse_groups
from packlight.run import piece_step
from packlight.run.pieces import Pieces

ROWS, WIDTH = 64, 96


@pytest.fixture(autouse=True)
def every_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a kernel takes says nothing here."""
    monkeypatch.setattr(fuse_groups, "MOST_SECONDS", float("inf"))


class Prints(nn.Module):
    """Pointwise chains between linear layers, with a word behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x) * 2 + 1) * 0.5
            print("norm", x.detach().norm(), file=io.StringIO())
        return x


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Prints(), torch.randn(ROWS, WIDTH)


@pytest.fixture
def fused_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of fused operations in all pieces that are captured."""
    names: list[str] = []
    captured = Pieces.captured

    def noting(self: Pieces, piece: Piece) -> None:
        operations = piece.step.graph.operations
        names.extend(o.name for o in operations if o.name.startswith(FUSED_NAMESPACE))
        captured(self, piece)

    monkeypatch.setattr(Pieces, "captured", noting)
    return names


def assert_close(mine: Any, eager: Any) -> None:
    for a, b in zip(mine, eager, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_fit_fuses_the_pieces_of_a_loss_that_breaks_and_recomputes_with_equal_bits(
    fused_names: list[str],
) -> None:
    moves = ("update-in-backward", "fuse")
    losses: list[list[float]] = []
    models: list[nn.Module] = []
    budget: int | None = None
    for _ in range(2):
        model, batch = net()
        step = packlight.fit(model, loss_fn, sgd(model), batch, budget, moves=moves, progress=False)
        losses.append([float(step(batch)) for _ in range(4)])
        models.append(model)
        assert fused_names, step.describe()
        assert ("moves", "update-in-backward, fuse") in step.how_it_runs()
        budget = int(0.97 * step.peak_bytes)
    assert losses[0] == losses[1]
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    eager, batch = net()
    optimizer = sgd(eager)
    for expected in losses[0]:
        optimizer.zero_grad()
        loss = loss_fn(eager, batch)
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(expected, rel=2e-6)
    assert_close(models[0].parameters(), eager.parameters())


def test_the_backend_fuses_the_pieces_of_a_model_that_breaks(fused_names: list[str]) -> None:
    model, batch = net()
    torch._dynamo.reset()
    backend = PacklightBackend(moves=("fuse",), progress=False)
    compiled = torch.compile(model, backend=backend)
    eager = copy.deepcopy(model)
    for _ in range(3):
        model.zero_grad()
        compiled(batch).square().mean().backward()
    loss_fn(eager, batch).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])
    assert fused_names


def test_a_loss_that_breaks_runs_unfused_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(piece_step, "compiler_problem", lambda device: "no g++ was found")
    model, batch = net()
    step = packlight.fit(model, loss_fn, sgd(model), batch, moves=("fuse",), progress=False)
    for _ in range(3):
        step(batch)
    why = ("without fuse", "nothing can be compiled here: no g++ was found")
    assert why in step.how_it_runs()
