"""Small parameters updated together in the backward: eager's bits, fewer calls, bounded bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.moves import in_backward
from packlight.step import OperationKind
from packlight.updates.several import SeveralOptimizers, updates_of
from packlight.updates.update import ParameterUpdates

ROWS, WIDTH, LAYERS = 16, 24, 3
MOVES = ("update-in-backward", "group-updates")
MakeOptimizer = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


@pytest.fixture
def grouping_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long calls take says nothing here."""
    monkeypatch.setattr(in_backward.GroupUpdates, "penalty", property(lambda self: 1e-3))


class Net(nn.Module):
    """Linear layers with norms, one weight read twice, one transposed, one scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.transposed = nn.Parameter(torch.randn(WIDTH, WIDTH).t() / 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.wide = nn.Linear(WIDTH, 6000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.tanh(layer(norm(x))) @ self.transposed
        return self.wide(x * self.scale)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd_in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Norms without weight decay, as many do it."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms}]
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    return [torch.optim.AdamW(others, lr=1e-2), torch.optim.SGD(norms, lr=1e-2)]


def fitted(make: MakeOptimizer, budget: Any = None, **options: Any) -> packlight.TrainStep:
    torch.manual_seed(0)
    model = Net()
    batch = torch.randn(ROWS, WIDTH)
    options.setdefault("moves", MOVES)
    return packlight.fit(model, loss_fn, make(model), batch, budget, progress=False, **options)


def group_sizes(step: packlight.TrainStep) -> list[int]:
    whole = step.ready.parts[0].step
    return sorted(len(whole.consumed_by[o]) for o in whole.grouped)


def assert_trains_like_eager(step: packlight.TrainStep, make: MakeOptimizer) -> None:
    eager = copy.deepcopy(step.model)
    made = make(eager)
    optimizers = made if isinstance(made, list) else [made]
    for seed in range(3):
        torch.manual_seed(seed)
        batch = torch.randn(ROWS, WIDTH)
        measured = step.measured(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_fn(eager, batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(measured.loss, loss.detach())
        assert measured.peak_bytes <= step.peak_bytes
    assert all(map(torch.equal, step.model.parameters(), eager.parameters()))
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("make", [adamw, sgd_in_groups, two_optimizers])
def test_updates_in_groups_keep_eagers_bits_within_the_plan(
    grouping_wins: None, make: MakeOptimizer
) -> None:
    step = fitted(make)
    sizes = group_sizes(step)
    assert sum(sizes) == 4 * LAYERS + 3  # all but the last layer's weight
    graph = step.profile.graph
    assert sum(o.kind is OperationKind.UPDATE for o in graph.operations) == len(sizes) + 1
    assert "small parameters updated together, up to 1.0 MiB at once" in step.describe()
    assert_trains_like_eager(step, make)


def test_groups_hold_no_more_gradients_than_they_may(
    monkeypatch: pytest.MonkeyPatch, grouping_wins: None
) -> None:
    most_bytes = 4 * 4 * WIDTH * WIDTH
    monkeypatch.setattr(in_backward, "GROUP_BYTES", (most_bytes,))
    step = fitted(adamw)
    whole = step.ready.parts[0].step
    assert len(whole.grouped) > 1
    for operation in whole.grouped:
        primals = whole.consumed_by[operation]
        gradients = [whole.joint.backward_results[p].meta["val"] for p in primals]
        assert sum(gradient.nbytes for gradient in gradients) <= most_bytes
    assert_trains_like_eager(step, adamw)


@pytest.mark.slow
def test_the_smallest_budget_is_met_with_or_without_groups() -> None:
    smallest: list[int] = []
    for moves in (MOVES[:1], MOVES):
        with pytest.raises(packlight.InfeasibleBudgetError) as caught:
            fitted(adamw, "1KiB", moves=moves)
        smallest.append(caught.value.smallest_bytes)
    assert smallest[1] <= smallest[0]
    assert_trains_like_eager(fitted(adamw, smallest[1]), adamw)


def test_groups_are_saved_and_loaded_with_a_way(grouping_wins: None, tmp_path: Path) -> None:
    step = fitted(adamw)
    step.save_way(tmp_path / "way.json")
    again = fitted(adamw, way=tmp_path / "way.json")
    assert again.plan.schedule == step.plan.schedule and group_sizes(again) == group_sizes(step)


def test_a_hook_added_after_planning_is_called(grouping_wins: None) -> None:
    step = fitted(adamw)
    parameter = next(iter(step.model.parameters()))
    parameter.register_hook(lambda gradient: gradient * 2)
    eager = copy.deepcopy(step.model)
    next(iter(eager.parameters())).register_hook(lambda gradient: gradient * 2)
    optimizer = adamw(eager)
    batch = torch.randn(ROWS, WIDTH)
    step(batch)
    loss_fn(eager, batch).backward()
    optimizer.step()
    assert all(map(torch.equal, step.model.parameters(), eager.parameters()))


def test_what_keeps_updates_out_of_the_backward_keeps_them_out_of_groups() -> None:
    step = fitted(adamw, clip_grad_norm=1.0)
    assert "without group-updates: parameters are not updated in the backward" in step.describe()


@pytest.mark.parametrize("make", [adamw, sgd_in_groups, two_optimizers])
def test_a_group_is_one_step_of_each_optimizer(make: MakeOptimizer) -> None:
    torch.manual_seed(0)
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    made, others = make(model), make(other)
    optimizer = SeveralOptimizers(made) if isinstance(made, list) else made
    updates = updates_of(optimizer)
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in model.parameters()]
        updates.begin_step()
        updates.apply_together([*zip(model.parameters(), map(torch.clone, gradients), strict=True)])
        updates.end_step()
        for parameter, gradient in zip(other.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for one in others if isinstance(others, list) else [others]:
            one.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_groups_cost_counts_what_copies_of_transposed_gradients_take() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 16)) for _ in range(2)]
    updates = ParameterUpdates(torch.optim.SGD(weights, lr=0.1))
    plain = updates.cost_together(weights, [(16, 1)] * 2)
    transposed = updates.cost_together(weights, [(1, 8)] * 2)
    assert transposed.workspace_bytes - plain.workspace_bytes == 2 * weights[0].nbytes
