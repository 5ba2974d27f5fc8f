"""Where a budget asks for microbatches, the step is still the whole batch's, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError, NonFiniteLossError
from packlight.moves.microbatch import move as microbatch_move
from packlight.moves.microbatch.move import Microbatch
from packlight.search.plan_way import Moves
from packlight.search.search import Search
from packlight.search.way import Way
from packlight.updates.update import ParameterUpdates
from tests import models
from tests.oracles.eager_loop import (
    LossFunction,
    MakeOptimizer,
    Training,
    assert_close,
    assert_no_gradients,
    assert_same_bits,
    twins,
)

IGNORED = -100
Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How many microbatches a budget leads to does not depend on times seen in another test."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Tokens(nn.Module):
    """A residual network for each token."""

    def __init__(self, has_norm: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(6)
        )
        self.norm = nn.BatchNorm1d(16) if has_norm else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).flatten(0, -2)
        if self.norm is not None:
            x = self.norm(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def mean_over_tokens(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"].flatten())


def sum_over_tokens(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["tokens"])
    return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")


def batch_of(seed: int = 0, is_uneven: bool = True, rows: int = 10) -> Batch:
    """Rows of 32 tokens; if uneven, rows count differently often and the first three not at all."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 32, (rows, 32), generator=generator) for _ in range(2))
    if is_uneven:
        for row in range(rows):
            labels[row, : 32 if row < 3 else 7 * row % 32] = IGNORED
    return {"tokens": tokens, "labels": labels}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-3)  # no division by mere rounding


def tokens(**options: Any) -> Tokens:
    torch.manual_seed(0)
    return Tokens(**options)


def smallest_whole(mine: Training, batch: Any) -> int:
    """Return the smallest budget in which the batch runs as a whole, as the error names it."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(
            mine.model, mine.loss_fn, mine.optimizer, batch, 1, moves=("update-in-backward",),
            progress=False,
        )
    return caught.value.smallest_bytes


def fit(mine: Training, batch: Any, share: float, **options: Any) -> packlight.TrainStep:
    """Plan for a share of the smallest budget that the whole batch needs."""
    budget = int(share * smallest_whole(mine, batch))
    options = {"moves": ("microbatch",), "progress": False, **options}
    step = packlight.fit(mine.model, mine.loss_fn, mine.optimizer, batch, budget, **options)
    assert step.way.num_microbatches > 1
    return step


BATCHES = [batch_of(seed) for seed in range(3)]
EVERYTHING = ("microbatch", "chunk", "update-in-backward")


@pytest.mark.parametrize(
    "loss_fn, make_optimizer, options",
    [
        (mean_over_tokens, sgd, {}),
        (mean_over_tokens, adamw, {"moves": EVERYTHING}),
        (mean_over_tokens, sgd, {"clip_grad_value": 0.001, "clip_grad_norm": 0.01}),
    ],
)
def test_ten_rows_in_four_microbatches_are_one_step_of_the_whole_batch(
    loss_fn: LossFunction, make_optimizer: MakeOptimizer, options: dict[str, Any]
) -> None:
    def clip(model: nn.Module) -> None:
        if "clip_grad_norm" in options:
            nn.utils.clip_grad_value_(model.parameters(), options["clip_grad_value"])
            nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad_norm"])

    mine, eager = twins(tokens(), loss_fn, make_optimizer)
    step = fit(mine, BATCHES[0], 0.75, **options)
    assert [part.num_rows for part in step.way.parts] == [3, 2]
    assert "4 microbatches (2 x 3 rows + 2 x 2 rows)" in step.describe()
    for batch in BATCHES:
        before = eager.model.head.weight.clone()
        torch.testing.assert_close(step(batch), eager.step(batch, clip), rtol=1e-5, atol=1e-5)
        assert_close(mine, eager, 1e-6)
        assert not torch.equal(eager.model.head.weight, before)
    measured_bytes = step.measured(batch_of(is_uneven=False)).peak_bytes
    assert step.budget_bytes is not None and measured_bytes <= step.budget_bytes
    assert abs(measured_bytes - step.peak_bytes) <= 0.005 * measured_bytes


def test_a_loss_scaler_sees_the_gradients_of_all_microbatches() -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)

    def gentle(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    mine, eager = twins(tokens(), sum_over_tokens, gentle)
    my_scaler, eager_scaler = scaler(), scaler()
    step = fit(mine, BATCHES[0], 0.75, scaler=my_scaler)
    num_skipped = 0
    for index in range(16):
        before = mine.model.head.weight.clone()
        step(BATCHES[index % 3])
        eager.step(BATCHES[index % 3], scaler=eager_scaler)
        num_skipped += torch.equal(mine.model.head.weight, before)
        assert my_scaler.state_dict() == eager_scaler.state_dict()
    assert_close(mine, eager, 1e-5)
    assert 0 < num_skipped < 16


def refusal(mine: Training, batch: Any, **options: Any) -> str:
    """Return why microbatches were refused where only they could have fitted."""
    budget = int(0.75 * smallest_whole(mine, batch))
    options = {"moves": ("microbatch",), "progress": False, **options}
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(mine.model, mine.loss_fn, mine.optimizer, batch, budget, **options)
    assert "without microbatch: " in caught.value.hint
    assert_no_gradients(mine.model)
    return caught.value.hint


def test_batch_norm_is_refused_by_name_unless_it_is_allowed() -> None:
    mine, _ = twins(tokens(has_norm=True), mean_over_tokens, sgd)
    hint = refusal(mine, BATCHES[0])
    assert "'norm'" in hint or "norm " in hint
    assert "allow={'microbatch-batch-norm'}" in hint
    step = fit(mine, BATCHES[0], 0.75, allow={"microbatch-batch-norm"})
    batch = batch_of(is_uneven=False)
    other = tokens(has_norm=True)
    for part in batch["tokens"].split(rows_of_microbatches(step)):
        other.norm(other.embed(part).flatten(0, -2))
    step(batch)
    torch.testing.assert_close(mine.model.norm.running_mean, other.norm.running_mean)
    torch.testing.assert_close(mine.model.norm.running_var, other.norm.running_var)
    step(batch)
    assert mine.model.norm.num_batches_tracked == 2 * step.way.num_microbatches


@pytest.mark.parametrize(
    ("has_batch_norm", "seconds_of_eleven", "chosen"),
    [(True, 1.0, 11), (True, 1.03, 11), (True, 1.1, 12), (False, 1.0, 16)],
)
def test_batch_norm_gets_as_many_rows_as_fit_unless_that_takes_long(
    monkeypatch: Any, has_batch_norm: bool, seconds_of_eleven: float, chosen: int
) -> None:
    """Eleven microbatches fit, fewer do not; from there on the times are alike."""

    def ways(_: Any, start: Moves) -> dict[Moves, Any]:
        count = count_of(start)
        if count < 11:
            return {}
        return {start: ready(start, {11: seconds_of_eleven, 16: 0.99}.get(count, 1.0), 2.0)}

    search = search_among(monkeypatch, ways, [1, 2, 4, 8, 16, 32], has_batch_norm)
    assert count_of(search.fastest().moves) == chosen


@pytest.mark.parametrize(("slowdown", "looked_at"), [(1.0, [1]), (1.04, [1]), (1.06, [1, 2])])
def test_no_microbatches_are_captured_where_they_could_hardly_be_faster(
    monkeypatch: Any, slowdown: float, looked_at: list[int]
) -> None:
    counts = []

    def ways(_: Any, start: Moves) -> dict[Moves, Any]:
        counts.append(count_of(start))
        return {start: ready(start, slowdown, slowdown)}

    assert count_of(search_among(monkeypatch, ways, [1, 2]).fastest().moves) == 1
    assert counts == looked_at


def count_of(moves: Moves) -> int:
    return next((move.count for move in moves if isinstance(move, Microbatch)), 1)


def ready(moves: Moves, seconds: float, slowdown: float) -> Any:
    """A way that takes so long, by the clock and beside the same calls without recomputation."""
    plan = SimpleNamespace(seconds=seconds, slowdown=slowdown)
    way = Way(moves, (SimpleNamespace(plan=plan, count=1),), *[None] * 2)  # type: ignore[arg-type]
    return SimpleNamespace(way=way, moves=moves)


def search_among(
    monkeypatch: Any, ways: Any, counts: list[int], has_batch_norm: bool = False
) -> Search:
    found: dict[Moves, Any] = {}

    def noted(search: Search, start: Moves) -> dict[Moves, Any]:
        found.update(new := ways(search, start))
        return new

    starts = [(Microbatch(n, 0, has_batch_norm),) if n > 1 else () for n in counts]
    monkeypatch.setattr(Search, "_from", noted)
    monkeypatch.setattr(Search, "_starts", lambda _: iter(starts))
    planner = SimpleNamespace(
        request=SimpleNamespace(budget_bytes=None), num_repeats=count_of, is_rehearsing=True,
        way=lambda moves, rehearses: found[moves], is_full_untraced=lambda moves: False,
    )
    return Search(planner)  # type: ignore[arg-type]


def test_microbatches_end_where_the_model_cannot_run_on_fewer_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    batch = torch.randn(8, 64), torch.randint(0, 10, (8,))
    with pytest.raises(InfeasibleBudgetError) as caught:  # batch norm needs two rows
        packlight.fit(
            model, models.classify, sgd(model), batch, 1024, moves=("microbatch",),
            allow={"microbatch-batch-norm"}, progress=False,
        )
    assert "without microbatch: 8 of them: " in caught.value.hint
    assert "Expected more than 1 value per channel" in caught.value.hint


def rows_of_microbatches(step: packlight.TrainStep) -> list[int]:
    parts = [(part, part.count) for part in step.way.parts]
    return [part.num_rows for part, count in parts for _ in range(count) if part.num_rows]


def test_a_contrastive_loss_is_refused() -> None:
    def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
        x = F.normalize(model(batch["tokens"]).view(len(batch["tokens"]), -1), dim=-1)
        return F.cross_entropy(10 * x @ x.roll(1, -1).T, torch.arange(len(x)))

    mine, eager = twins(tokens(), contrastive, sgd)
    hint = refusal(mine, {"tokens": BATCHES[0]["tokens"]})
    assert "split into microbatches" in hint
    budget = smallest_whole(mine, {"tokens": BATCHES[0]["tokens"]})
    step = packlight.fit(
        mine.model, contrastive, mine.optimizer, {"tokens": BATCHES[0]["tokens"]}, budget,
        moves=("microbatch", "update-in-backward"), progress=False,
    )
    assert step.way.num_microbatches == 1
    batch = {"tokens": BATCHES[0]["tokens"]}
    assert step(batch).item() == eager.step(batch).item()
    assert_same_bits(mine, eager)


def test_rows_are_compared_once_for_a_graph_and_always_for_a_weight_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = []
    settle = microbatch_move.settle

    def noted(*arguments: Any, **options: Any) -> Any:
        looked_at.append(arguments)
        return settle(*arguments, **options)

    monkeypatch.setattr(microbatch_move, "settle", noted)

    def looks(loss_fn: LossFunction, batch: Batch, **options: Any) -> int:
        mine, _ = twins(tokens(), loss_fn, sgd)
        before = len(looked_at)
        fit(mine, batch, 0.6, **options)
        return len(looked_at) - before

    def doubled(model: nn.Module, batch: Batch) -> torch.Tensor:
        return 2 * mean_over_tokens(model, batch)

    assert looks(mean_over_tokens, BATCHES[0]) == 1
    assert looks(mean_over_tokens, BATCHES[0]) == 0
    assert looks(doubled, BATCHES[0]) == 1
    assert looks(mean_over_tokens, batch_of(rows=12)) == 1
    weight = {"loss_weight": lambda batch: (batch["labels"] != IGNORED).sum()}
    assert looks(mean_over_tokens, BATCHES[0], **weight) == 1
    assert looks(mean_over_tokens, BATCHES[0], **weight) == 1


def test_leaves_that_disagree_run_as_a_whole_and_are_named_where_they_cannot() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        labels = batch["labels"].flatten()
        return F.cross_entropy(model(batch["tokens"]), labels, batch["class_weight"])

    batch = {**BATCHES[0], "class_weight": torch.rand(32)}
    mine, eager = twins(tokens(), loss_fn, sgd)
    assert "batch['class_weight'] of shape (32,) has 32 rows" in refusal(mine, batch)
    budget = smallest_whole(mine, batch)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch, budget, progress=False,
        moves=("microbatch", "update-in-backward"),
    )
    assert step(batch).item() == eager.step(batch).item()
    assert_same_bits(mine, eager)


def test_a_failing_microbatch_leaves_everything_as_it_was(monkeypatch: Any) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return mean_over_tokens(model, batch) * batch["scale"].amax()

    def scaled(value: float, row: int = 9) -> Batch:
        scale = torch.ones(10)
        scale[row] = value
        return {**batch_of(is_uneven=False), "scale": scale}

    mine, eager = twins(tokens(has_norm=True), loss_fn, adamw)
    options: dict[str, Any] = {"allow": {"microbatch-batch-norm"}, "loss_weight": "rows"}
    step = fit(mine, scaled(1.0), 0.75, **options)
    step(scaled(1.0))
    eager.model.load_state_dict(mine.model.state_dict())
    eager.optimizer.load_state_dict(mine.optimizer.state_dict())
    with pytest.raises(NonFiniteLossError) as caught:
        step(scaled(float("nan")))
    assert caught.value.step_index == 1
    assert caught.value.microbatch_index == step.way.num_microbatches - 1
    assert_same_bits(mine, eager)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ParameterUpdates, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(scaled(1.0))
    assert_no_gradients(mine.model)
    step(scaled(1.0))
    assert not torch.equal(mine.model.head.weight, eager.model.head.weight)


def dense_batch() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {name: torch.rand(8, 4, 24, 24, generator=made) for name in ("x", "y")}


ELEMENTWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": F.mse_loss,
    "sum of squares": lambda x, y: F.mse_loss(x, y, reduction="sum") / 512,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "binary cross entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y),
    "soft margin": lambda x, y: F.soft_margin_loss(x, y.round() * 2 - 1),
    "two of them": lambda x, y: F.mse_loss(x, y) + F.smooth_l1_loss(x, y),
    "l1": F.l1_loss,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_scalar_with_room_for_every_element_takes_a_scalars_room(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = dense_batch()

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return ELEMENTWISE[name](model(batch["x"]), batch["y"])

    for moves in (("microbatch",), ("update-in-backward",)):
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.fit(model, loss_fn, optimizer, batch, 1000, moves=moves, progress=False)
        step = packlight.fit(
            model, loss_fn, optimizer, batch, caught.value.smallest_bytes, moves=moves,
            progress=False,
        )
        assert (step.way.num_microbatches > 1) == (moves == ("microbatch",))
        kept = [step.measured(batch) for _ in range(3)]
        assert max(seen.peak_bytes for seen in kept) <= step.peak_bytes
        assert {seen.loss.untyped_storage().nbytes() for seen in kept} == {4}
