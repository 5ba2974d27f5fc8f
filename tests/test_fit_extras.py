"""Losses that return more than the loss, and those that assert things of tensors."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.capture.batch import plain_leaves
from packlight.errors import InfeasibleBudgetError, MicrobatchError
from packlight.moves.microbatch.extras import check_extras
from packlight.moves.microbatch.independence import FewRows
from tests.losses import asserted
from tests.oracles.eager_loop import Training, assert_no_gradients, assert_same_bits, twins

EXACT = ("update-in-backward", "pack")
ROWS = 48
Batch = dict[str, torch.Tensor]
Losses = namedtuple("Losses", "total logits")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.GELU(),
        nn.Linear(32, 4),
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def batch_of(seed: int = 0, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 16, generator=generator),
        "y": torch.randint(0, 4, (rows,), generator=generator),
    }


def logits_and_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(batch["x"])
    return logits, F.cross_entropy(logits, batch["y"])


def metrics(model: nn.Module, batch: Batch) -> Any:
    logits, loss = logits_and_loss(model, batch)
    correct = (logits.argmax(1) == batch["y"]).float()
    return loss, {"accuracy": correct.mean(), "logits": logits, "name": "me", "rows": len(logits)}


def views_and_inputs(model: nn.Module, batch: Batch) -> Any:
    logits, loss = logits_and_loss(model, batch)
    mine = model[0].weight
    return [loss, logits[:, 0], logits.T, batch["x"], batch["x"][1:], mine, None, loss, loss * 2]


def named(model: nn.Module, batch: Batch) -> Any:
    logits, loss = logits_and_loss(model, batch)
    return Losses(loss, {"deep": [(logits.softmax(1),)]})


def alone_in_a_tuple(model: nn.Module, batch: Batch) -> Any:
    return (logits_and_loss(model, batch)[1],)


def with_hidden_state(model: nn.Module, batch: Batch) -> Any:
    model.last = hidden = model[0](batch["x"])
    return F.cross_entropy(model[1:](hidden), batch["y"]), hidden


KINDS: dict[str, Callable[[nn.Module, Batch], Any]] = {
    f.__name__: f
    for f in (metrics, views_and_inputs, named, alone_in_a_tuple, with_hidden_state)
}


def eager_step(training: Training, batch: Batch) -> Any:
    training.optimizer.zero_grad()
    returned = training.loss_fn(training.model, batch)
    returned[0].backward()
    # What comes after the loss is looked at before the update: some of it are parameters.
    kept = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in leaves(returned)]
    training.optimizer.step()
    training.optimizer.zero_grad()
    return returned, kept


def leaves(returned: Any) -> list[Any]:
    return [value for _, value in plain_leaves(returned)]


def smallest_budget(mine: Training, batch: Batch, **options: Any) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        options["progress"] = False
        packlight.plan(mine.model, mine.loss_fn, mine.optimizer, batch, 1, **options)
    return caught.value.smallest_bytes


@pytest.mark.parametrize("is_tight", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_loss_returns_beside_it_is_handed_back_within_the_budget(
    kind: str, is_tight: bool
) -> None:
    mine, eager = twins(net(), KINDS[kind], sgd)
    budget = smallest_budget(mine, batch_of(), moves=EXACT) if is_tight else None
    step = packlight.fit(
        mine.model, mine.loss_fn, mine.optimizer, batch_of(), budget, moves=EXACT, progress=False
    )
    held: Any = None  # as in `loss, metrics = step(batch)`: until the next is there
    for seed in range(3):
        batch = batch_of(seed)
        resident = [*mine.model.parameters(), *batch.values(), *(held or [])]
        resident += [s["momentum_buffer"] for s in mine.optimizer.state.values()]
        resident += [mine.model.last] if hasattr(mine.model, "last") else []
        before_bytes = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in resident}.values())
        torch.manual_seed(seed)
        peak = packlight.measure_peak(lambda batch=batch: step(batch))
        assert budget is None or before_bytes + peak.peak_bytes <= budget
        torch.manual_seed(seed)
        _, expected = eager_step(eager, batch)
        ours = leaves(peak.result)
        assert [type(v) for v in ours if not torch.is_tensor(v)] == [
            type(v) for v in expected if not torch.is_tensor(v)
        ]
        weight = mine.model[0].weight
        for a, b in zip(ours, expected, strict=True):
            if torch.is_tensor(a) and a.data_ptr() == weight.data_ptr():
                continue  # the user's own parameter, after the update
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
            assert not torch.is_tensor(a) or not a.requires_grad
        made = [v for v in ours[1:] if torch.is_tensor(v)]
        inputs = {weight.data_ptr(), batch["x"].data_ptr(), batch["x"][1:].data_ptr()}
        held = [v for v in made if v.data_ptr() not in inputs]
        assert_same_bits(mine, eager)
    returned, _ = eager_step(eager, batch_of(5))
    torch.manual_seed(5)
    assert type(step(batch_of(5))) is type(returned)


def test_rows_of_microbatches_are_put_together_again() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        logits, _ = logits_and_loss(model, batch)
        losses = F.cross_entropy(logits, batch["y"], reduction="none")
        return losses.mean(), {"losses": losses, "guess": logits.argmax(1)}, "a name"

    model = net()
    model[2].p = 0.0
    mine, eager = twins(model, loss_fn, sgd)
    moves = (*EXACT, "microbatch")
    whole = smallest_budget(mine, batch_of(), moves=EXACT)
    budget = smallest_budget(mine, batch_of(), moves=moves)
    assert budget < whole
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(), budget, moves=moves, progress=False
    )
    assert step.way.num_microbatches > 1
    for seed in range(3):
        measured = step.measured(batch_of(seed))
        assert measured.peak_bytes <= budget
        (loss, expected, _), _ = eager_step(eager, batch_of(seed))
        torch.testing.assert_close(measured.loss, loss.detach())
        extras, name = measured.extras
        assert name == "a name" and torch.equal(extras["guess"], expected["guess"])
        torch.testing.assert_close(extras["losses"], expected["losses"].detach())


@pytest.mark.parametrize(
    "extra, message",
    [
        (lambda m, b, z: z.argmax(1).float().mean(), "no row"),
        (lambda m, b, z: z @ z.T, "other company"),
        (lambda m, b, z: z.softmax(0), "other company"),
        (lambda m, b, z: z.T, "row"),
        (lambda m, b, z: b["x"], "what the batch holds"),
        (lambda m, b, z: len(z), "other company"),
    ],
)
def test_extras_that_are_no_rows_let_a_batch_run_as_a_whole(extra: Any, message: str) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        logits, loss = logits_and_loss(model, batch)
        return loss, extra(model, batch, logits)

    with pytest.raises(MicrobatchError, match=message):
        with FewRows.looked_at(net(), loss_fn, batch_of(rows=3)) as few:
            check_extras(few)
    mine, _ = twins(net(), loss_fn, sgd)
    with pytest.raises(InfeasibleBudgetError, match=f"without microbatch: .*{message}"):
        packlight.fit(mine.model, loss_fn, mine.optimizer, batch_of(), 1, progress=False)


class Codebook(nn.Module):
    """Vectors replaced by their nearest neighbours, as in a VQ-VAE: classes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.codes = nn.Linear(16, 8), nn.Parameter(torch.randn(6, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        nearest = torch.cdist(h, self.codes).argmin(1)
        chosen = F.one_hot(nearest, 6).to(h.dtype) @ self.codes
        return self.out(h + (chosen - h).detach() + 0.1 * chosen)


@pytest.mark.parametrize("make", [net, Codebook])
def test_assertions_are_made_at_every_step(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    mine, eager = twins(make(), asserted, sgd)
    batch = {**batch_of(), "limit": torch.tensor(1e3)}
    budget = smallest_budget(mine, batch, moves=EXACT)
    step = packlight.fit(
        mine.model, asserted, mine.optimizer, batch, budget, moves=EXACT, progress=False
    )
    for seed in range(3):
        torch.manual_seed(seed)
        measured = step.measured(batch)
        torch.manual_seed(seed)
        assert measured.loss.item() == eager.step(batch).item()
        assert measured.peak_bytes <= budget
    assert_same_bits(mine, eager)
    for wrong in ({"limit": torch.tensor(1e-9)}, {"x": torch.full((ROWS, 16), torch.nan)}):
        bad = {**batch, **wrong}
        with pytest.raises((RuntimeError, AssertionError)):
            eager.step(bad)
        eager.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"too large|not finite|Assertion"):
            step(bad)
        assert_no_gradients(mine.model)
        assert_same_bits(mine, eager)


def repeated(model: nn.Module, batch: Batch) -> torch.Tensor:
    counts = batch["y"] * 0 + 2
    many = torch.repeat_interleave(model(batch["x"]), counts, dim=0, output_size=2 * ROWS)
    return many.square().mean()


def in_segments(model: nn.Module, batch: Batch) -> torch.Tensor:
    lengths = torch.cat([batch["y"][:1] * 0 + 5, batch["y"][:1] * 0 + ROWS - 5])
    return torch.segment_reduce(model(batch["x"]), "mean", lengths=lengths).square().sum()


def of_offsets(model: nn.Module, batch: Batch) -> torch.Tensor:
    offsets = torch.cat([batch["y"][:1] * 0, batch["y"][:1] * 0 + 7, batch["y"][:1] * 0 + ROWS])
    return torch.segment_reduce(model(batch["x"]), "max", offsets=offsets).square().sum()


@pytest.mark.parametrize("loss_fn", [repeated, in_segments, of_offsets])
def test_operators_that_need_fitting_numbers_are_observed(loss_fn: Any) -> None:
    mine, eager = twins(net(), loss_fn, sgd)
    budget = smallest_budget(mine, batch_of(), moves=EXACT)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(), budget, moves=EXACT, progress=False
    )
    for seed in range(2):
        torch.manual_seed(seed)
        measured = step.measured(batch_of(seed))
        torch.manual_seed(seed)
        assert measured.loss.item() == eager.step(batch_of(seed)).item()
        assert measured.peak_bytes <= budget
    assert_same_bits(mine, eager)
