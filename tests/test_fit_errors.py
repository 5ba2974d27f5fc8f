"""What `fit` says to bad input, and that a step that failed has changed nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import (
    InfeasibleBudgetError,
    NonFiniteLossError,
    OptionError,
    UnsupportedModelError,
)
from packlight.search.plan_way import WayPlanner
from packlight.units import parse_bytes
from tests.models import make
from tests.oracles.eager_loop import Training, assert_no_gradients, assert_same_bits, twins

Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Budgets found in one test do not depend on times seen in another."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 4)
    )


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def batch_of(rows: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 16, generator=generator),
        "y": torch.randint(0, 4, (rows,), generator=generator),
    }


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fit(mine: Training, batch: Any, budget: Any = None, **options: Any) -> packlight.TrainStep:
    options = {"moves": ("update-in-backward",), "progress": False, **options}
    return packlight.fit(
        mine.model, mine.loss_fn, mine.optimizer, batch, budget, **options
    )


@pytest.mark.parametrize("moves", [("update-in-backward",), (), ("microbatch",)])
def test_the_smallest_budget_is_named_and_works_and_no_byte_less_does(moves: Any) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return (model(batch["x"]) - batch["y"][:, None]).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4))
    mine, eager = twins(model, loss_fn, adamw)
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    batch = batch_of(64)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, batch, parameter_bytes // 2, moves=moves)
    smallest = caught.value.smallest_bytes
    assert str(smallest) in str(caught.value) and "parameters" in str(caught.value)
    assert smallest > 3 * parameter_bytes + sum(t.nbytes for t in batch.values())
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, batch, smallest - 1, moves=moves)
    assert caught.value.smallest_bytes == smallest
    step = fit(mine, batch, smallest, moves=moves)
    step(batch)
    eager.step(batch)
    measured = step.measured(batch)
    torch.testing.assert_close(measured.loss, eager.step(batch))
    assert measured.peak_bytes <= smallest


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"), r"shape \(12,\)"),
        (lambda m, b: m(b["x"]).mean()[None], r"shape \(1,\)\nhint: take the mean"),
        (lambda m, b: {"loss": loss_of(m, b)}, r"1 tensor of shape .*\nhint: return \(loss, "),
        (lambda m, b: (m(b["x"]), loss_of(m, b)), r"scalar tensor first.*\(12, 4\)"),
        (lambda m, b: b["x"].square().mean(), "does not depend on any parameter"),
        (lambda m, b: m(b["x"]).detach().mean(), "does not depend on any parameter"),
    ],
)
def test_losses_that_are_none_are_refused(loss_fn: Any, message: str) -> None:
    mine, _ = twins(net(), loss_fn, adamw)
    with pytest.raises(UnsupportedModelError, match=message):
        fit(mine, batch_of())


def test_optimizers_over_other_parameters_and_strange_options_are_refused() -> None:
    other, mine = adamw(net()), twins(net(), loss_of, adamw)[0]
    with pytest.raises(UnsupportedModelError, match=r"6 parameters.*not the model's.*\(24, 16\)"):
        packlight.fit(mine.model, loss_of, other, batch_of(), progress=False)
    with pytest.raises(OptionError, match="'microbatches'.*\n.*'microbatch'"):
        fit(mine, batch_of(), moves=("microbatches",))
    with pytest.raises(OptionError, match="'int4'"):
        fit(mine, batch_of(), allow={"int4"})
    mine.model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="nothing to train"):
        fit(mine, batch_of())


def state_of(training: Training) -> dict[str, Any]:
    return copy.deepcopy({
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict()["state"],
    })


def assert_unchanged(training: Training, before: dict[str, Any]) -> None:
    now = state_of(training)
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert_no_gradients(training.model)


@pytest.mark.parametrize("moves", [("update-in-backward",), ()])
def test_a_loss_that_is_not_finite_changes_nothing_and_training_goes_on(moves: Any) -> None:
    mine, eager = twins(net(), loss_of, adamw)
    step = fit(mine, batch_of(), moves=moves)
    for training in (mine, eager):
        torch.manual_seed(1)
        (step if training is mine else eager.step)(batch_of(seed=1))
    before = state_of(mine)
    for value in (float("nan"), float("inf")):
        bad = batch_of(seed=2)
        bad["x"][3, 5] = value
        with pytest.raises(NonFiniteLossError, match="the loss of step 2 is nan") as caught:
            step(bad)
        assert caught.value.step_index == 1 and caught.value.microbatch_index is None
        assert_unchanged(mine, before)
    for seed in (3, 4):
        torch.manual_seed(seed)
        loss = step(batch_of(seed=seed))
        torch.manual_seed(seed)
        assert loss.item() == eager.step(batch_of(seed=seed)).item()
    assert_same_bits(mine, eager)


def test_a_shape_that_does_not_fit_is_an_error_and_the_old_one_still_trains() -> None:
    mine, eager = twins(net(), loss_of, adamw)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, batch_of(), 1)
    step = fit(mine, batch_of(), caught.value.smallest_bytes)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = step(batch_of(seed=seed))
        torch.manual_seed(seed)
        assert loss.item() == eager.step(batch_of(seed=seed)).item()
        before = state_of(mine)
        with pytest.raises(InfeasibleBudgetError) as caught:
            step(batch_of(rows=500))
        assert caught.value.budget_bytes == step.budget_bytes < caught.value.smallest_bytes
        assert_unchanged(mine, before)
        assert step.peak_bytes <= step.budget_bytes
    assert_same_bits(mine, eager)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "options", [{"moves": ()}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0, "moves": ()}]
)
def test_an_interrupted_update_leaves_no_gradient(
    options: dict[str, Any], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, eager = twins(net(), loss_of, adamw)
    step = fit(mine, batch_of(), **options)

    def interrupted(closure: Any = None) -> None:
        assert any(p.grad is not None for p in mine.model.parameters())
        raise error("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(mine.optimizer, "step", interrupted)
        torch.manual_seed(0)
        with pytest.raises(error):
            step(batch_of())
    assert_no_gradients(mine.model)
    assert mine.optimizer.state_dict()["state"] == {}
    mine.model.load_state_dict(eager.model.state_dict())
    if "clip_grad_norm" not in options and "clip_grad_value" not in options:
        for seed in (1, 2):
            torch.manual_seed(seed)
            loss = step(batch_of(seed=seed))
            torch.manual_seed(seed)
            assert loss.item() == eager.step(batch_of(seed=seed)).item()
        assert_same_bits(mine, eager)


def test_an_interrupted_backward_with_updates_leaves_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, _ = twins(net(), loss_of, adamw)
    step = fit(mine, batch_of())
    before = copy.deepcopy(mine.model.state_dict())
    plain: Callable[..., Any] = torch.optim.AdamW.step.__wrapped__  # type: ignore[attr-defined]
    calls: list[Any] = []

    def interrupted(optimizer: Any, closure: Any = None) -> None:
        calls.append(optimizer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(optimizer, closure)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(batch_of())
    assert_no_gradients(mine.model)
    after = mine.model.state_dict()
    weights = [name for name in before if name.endswith(("weight", "bias"))]
    assert sum(torch.equal(before[n], after[n]) for n in weights) == len(weights) - 2
    step(batch_of())


def test_an_optimizer_changed_so_that_it_cannot_step_alone_is_told_before_anything_runs() -> None:
    mine, _ = twins(net(), loss_of, adamw)
    step = fit(mine, batch_of())
    step(batch_of())
    before = state_of(mine)
    handle = mine.optimizer.register_step_post_hook(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match="step hooks are registered.*\nhint: remove"):
        step(batch_of())
    assert_unchanged(mine, before)
    handle.remove()
    step(batch_of())
    assert mine.optimizer.state[mine.model[0].weight]["step"] == 2


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    mine, _ = twins(model, loss_of, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    with pytest.raises(UnsupportedModelError, match="sparse_coo.*\n?.*sparse=False"):
        fit(mine, {"x": torch.randint(0, 10, (12,)), "y": batch_of()["y"]})


def test_numbers_that_change_at_every_step_are_told_of_once() -> None:
    class Counting(nn.Linear):
        """Counts its calls in a plain number, which makes each step another one."""

        num_calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            return super().forward(x) * self.num_calls

    torch.manual_seed(0)
    mine, eager = twins(Counting(16, 4), loss_of, adamw)
    step = fit(mine, batch_of())
    with pytest.warns(UserWarning, match="6 of 6 steps were planned anew") as caught:
        losses = [step(batch_of(seed=seed)).item() for seed in range(8)]
    assert len(caught) == 1
    assert losses == [eager.step(batch_of(seed=seed)).item() for seed in range(8)]
    assert_same_bits(mine, eager)


def test_the_hint_of_a_small_budget_does_not_blame_gradients_of_parameters_on_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(3)])
    mine, _ = twins(model, lambda m, b: m(b["x"]).square().mean(), adamw)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, {"x": torch.randn(4, 128)}, 1)
    assert caught.value.peak_operation.startswith("the update of '")
    said = re.search(r"even a tiny batch leaves (.*) of parameters, optimizer", caught.value.hint)
    weights = sum(p.nbytes for p in model.parameters())
    assert said is not None
    # Weights, two states, and the gradient of one layer at least.
    assert 3 * weights + 64 * 1024 <= parse_bytes(said[1]) <= caught.value.smallest_bytes


def image_step(num_rows: int, budget: int) -> packlight.TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch = {"x": torch.randn(num_rows, 3, 12, 12), "y": torch.randn(num_rows, 3, 12, 12)}
    return packlight.fit(
        model, lambda m, b: F.mse_loss(m(b["x"]), b["y"]), optimizer, batch, budget,
        moves=packlight.EXACT_MOVES, progress=False,
    )


@pytest.mark.parametrize("percent", [90, 60, 35])
def test_the_share_of_a_batch_that_the_hint_names_needs_about_what_it_says(percent: int) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        image_step(16, 1000)
    budget = caught.value.smallest_bytes * percent // 100
    with pytest.raises(InfeasibleBudgetError) as caught:
        image_step(16, budget)
    named = r"1/(\d+) of the batch would need about (.*)$"
    said = re.search(named, caught.value.hint, re.MULTILINE)
    assert said is not None
    with pytest.raises(InfeasibleBudgetError) as smaller:
        image_step(16 // int(said[1]), 1000)
    # Scaled from what the whole batch needs; looked for by itself, less may do.
    assert 0.9 <= parse_bytes(said[2]) / smaller.value.smallest_bytes <= 1.2
    image_step(16 // int(said[1]), budget)  # fits


def test_a_budget_that_an_error_names_is_met_whatever_was_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 128))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(0, 32, (8, 8))

    def step(budget: int) -> packlight.TrainStep:
        return packlight.fit(
            model, lambda m, b: F.cross_entropy(m(b).flatten(0, 1), b.flatten()), optimizer, tokens,
            budget, moves=("chunk", "update-in-backward"), progress=False,
        )

    asked = 1000
    for _ in range(2):
        with pytest.raises(InfeasibleBudgetError) as caught:
            step(asked)
        named = caught.value.smallest_bytes
        assert step(named).measured(tokens).peak_bytes <= named
        asked = named * 9 // 10


def test_gradients_that_are_there_before_a_step_are_not_dropped_in_silence() -> None:
    mine, _ = twins(net(), loss_of, adamw)
    step = fit(mine, batch_of())
    loss_of(mine.model, batch_of(seed=1)).backward()
    before = copy.deepcopy(mine.model.state_dict())
    with pytest.raises(UnsupportedModelError, match="hold gradients already"):
        step(batch_of())
    assert mine.model[0].weight.grad is not None
    assert all(torch.equal(before[k], v) for k, v in mine.model.state_dict().items())
    mine.optimizer.zero_grad()
    step(batch_of())
    assert_no_gradients(mine.model)


def test_a_parameter_that_no_optimizer_holds_is_named() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"4 parameters .* the first of them '1\.weight'"):
        step = packlight.fit(model, loss_of, optimizer, batch_of(), progress=False)
    before = model[4].weight.clone()
    step(batch_of())
    assert torch.equal(model[4].weight, before)


def test_the_smallest_budget_is_enough_for_microbatches_of_both_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row may need more than two: a kernel's workspace does not have to grow with the batch."""
    needed_bytes = {3: 900_000, 2: 500_000, 1: 600_000}

    def refused(self: Any, step: Any, draft: Any, *arguments: Any) -> Any:
        rows = max(t.shape[0] for t in draft.loss.arguments if t.shape[1:] == (4,))
        raise InfeasibleBudgetError(1, needed_bytes[rows], "", [], "")

    monkeypatch.setattr(WayPlanner, "_planned", refused)
    mine, _ = twins(nn.Linear(4, 1), lambda m, b: m(b["x"]).square().mean(), adamw)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, {"x": torch.randn(3, 4)}, 1, moves=("microbatch",))
    assert caught.value.smallest_bytes == 600_000


def test_more_moves_never_need_more() -> None:
    # A loss head in chunks needs a little more where the head is not what is largest.
    smallest = {}
    for moves in (packlight.EXACT_MOVES, packlight.MOVES):
        torch.manual_seed(0)
        model, batch, loss_fn = make("vit", layers=2, width=256, heads=4)
        optimizer = adamw(model.train())
        chosen = tuple(name for name in moves if name != "offload")
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.fit(model, loss_fn, optimizer, batch, 1, moves=chosen, progress=False)
        smallest[moves] = caught.value.smallest_bytes
    assert smallest[packlight.MOVES] <= smallest[packlight.EXACT_MOVES]


def test_an_unknown_option_is_named_with_the_one_that_was_meant() -> None:
    mine, _ = twins(nn.Linear(4, 1), lambda m, b: m(b).square().mean(), adamw)
    with pytest.raises(OptionError, match="'clip_norm'.*\n.*'clip_grad_norm'"):
        packlight.fit(mine.model, mine.loss_fn, mine.optimizer, torch.ones(2, 4), clip_norm=1.0)


@pytest.mark.parametrize("door", [packlight.plan, packlight.profile])
def test_arguments_in_an_older_order_are_told_the_present_one(door: Any) -> None:
    mine, _ = twins(nn.Linear(4, 1), lambda m, b: m(b).square().mean(), adamw)
    with pytest.raises(OptionError, match="Tensor and no optimizer.*\n.*loss_fn, optimizer, batch"):
        door(mine.model, mine.loss_fn, torch.ones(2, 4), mine.optimizer)
