"""Batches as data loaders give them: with file names, nested, taken apart by the loss."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError, PacklightError
from tests.oracles.eager_loop import assert_same_bits, twins

EXACT = ("update-in-backward",)
ROWS = 16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def tensors(seed: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 16, generator=generator),
        "y": torch.randint(0, 4, (rows,), generator=generator),
    }


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


class Opaque:
    """Something of the user's; prints as another thing each time."""


@dataclass
class Sample:
    """A batch with all that a loader may add."""

    x: torch.Tensor
    y: torch.Tensor
    names: list[str] = field(default_factory=list)


Named = namedtuple("Named", "x y meta")


def flat(seed: int) -> Any:
    names = [f"scan_{seed}_{i}.nii" for i in range(ROWS)]
    return {**tensors(seed), "file": names, "index": list(range(seed, seed + ROWS))}


def nested(seed: int) -> Any:
    meta = [{"id": str(seed), "size": (seed, 2 * seed)}, {"path": Path(f"/{seed}")}, Opaque()]
    return {"data": {"in": tensors(seed)}, "meta": meta, "none": None, "bytes": bytes([seed])}


def encoding(seed: int) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({**tensors(seed), "text": [f"sentence {seed}"] * ROWS})


def take(batch: Any) -> dict[str, torch.Tensor]:
    if hasattr(batch, "x"):
        return {"x": batch.x, "y": batch.y}
    inner = batch["data"]["in"] if "data" in batch else batch
    return {"x": inner["x"], "y": inner["y"]}


def moved_to_device(batch: Any) -> dict[str, torch.Tensor]:
    batch = {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return {k: v for k, v in batch.items() if torch.is_tensor(v)}


def popped(batch: Any) -> dict[str, torch.Tensor]:
    batch.pop("file", None)
    x = batch.pop("x")
    return {"x": x, "y": batch.pop("y")}


def popped_deep(batch: Any) -> dict[str, torch.Tensor]:
    batch.pop("meta")
    inner = batch["data"].pop("in")
    return {"x": inner.pop("x"), "y": inner.pop("y")}


def changed(batch: Any) -> dict[str, torch.Tensor]:
    batch["x"] = batch["x"] * 1.0
    batch["extra"] = batch["x"].sum()
    return {"x": batch["x"], "y": batch["y"]}


READERS: dict[str, tuple[Callable[[int], Any], Callable[[Any], dict[str, torch.Tensor]]]] = {
    "file names": (lambda seed: {**flat(seed), "epoch": seed, "rate": seed / 7}, take),
    "nested metadata": (nested, take),
    "moved to a device": (flat, moved_to_device),
    "taken out": (flat, popped),
    "taken out deep inside": (nested, popped_deep),
    "put in": (lambda seed: dict(tensors(seed), id=f"{seed}"), changed),
    "user dict": (lambda seed: UserDict(tensors(seed), fixed="text"), popped),
    "encoding": (encoding, take),
    "dataclass": (lambda seed: Sample(**tensors(seed), names=["a"] * seed), take),
    "named tuple": (lambda seed: Named(*tensors(seed).values(), {"n": str(seed)}), take),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_a_loss_does_not_read_makes_no_new_plan(reader: str) -> None:
    make, read = READERS[reader]

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, **read(batch))

    mine, eager = twins(net(), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, make(1), moves=EXACT, progress=False
    )
    for seed in range(5):
        batch = make(seed)
        before = take(batch)
        assert step(batch).item() == eager.step(make(seed)).item()
        after = take(batch)
        assert all(after[name] is before[name] for name in before), "the batch is the user's"
    assert_same_bits(mine, eager)
    assert step._num_plans == 1


@pytest.mark.parametrize("reader", ["taken out", "put in", "file names"])
def test_batches_that_are_taken_apart_run_in_microbatches(reader: str) -> None:
    make_small, read = READERS[reader]

    def make(seed: int) -> Any:
        return {**make_small(seed), **tensors(seed, 256)}

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, **read(batch))

    mine, eager = twins(net(), loss_fn, sgd)
    moves = (*EXACT, "microbatch")
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(
            mine.model, loss_fn, mine.optimizer, make(1), 1, moves=moves, progress=False
        )
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, make(1), caught.value.smallest_bytes, moves=moves,
        progress=False,
    )
    assert step.way.num_microbatches > 1
    for seed in range(3):
        torch.testing.assert_close(step(make(seed)), eager.step(make(seed)))
    assert step._num_plans == 1


def test_a_plain_value_that_the_loss_reads_is_planned_once_for_each_value() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_of(model, batch["x"], batch["y"])
        if batch["mode"] == "square":
            return loss.square()
        return loss * batch["factor"] if batch["mode"] == "scaled" else loss

    def batch_of(index: int) -> Any:
        mode = ("square", "scaled", "plain")[index % 3]
        return {**flat(index), "mode": mode, "factor": 0.5 + index % 2}

    mine, eager = twins(net(), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(0), moves=EXACT, progress=False
    )
    for index in range(12):
        assert step(batch_of(index)).item() == eager.step(batch_of(index)).item()
    assert_same_bits(mine, eager)
    assert step._num_plans == 4, "square, plain, and scaled by either factor"


class Queue(nn.Module):
    """As in MoCo: keys of the last batches, written where a plain number points."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 8), nn.Linear(16, 8).requires_grad_(False)
        self.register_buffer("queue", torch.randn(8, 3 * ROWS))
        self.place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            key = F.normalize(self.key(x), dim=1)
        near = (query * key).sum(1, keepdim=True)
        logits = torch.cat([near, query @ self.queue.clone().detach()], 1) / 0.2
        self.queue[:, self.place : self.place + ROWS] = key.T
        self.place = (self.place + ROWS) % self.queue.shape[1]
        return logits


def test_a_number_that_comes_round_again_is_planned_once_for_each_value() -> None:
    torch.manual_seed(0)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), torch.zeros(ROWS, dtype=torch.long))

    mine, eager = twins(Queue(), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, tensors(0), moves=EXACT, progress=False
    )
    for seed in range(9):
        assert step(tensors(seed)).item() == eager.step(tensors(seed)).item()
        assert mine.model.place == eager.model.place
    assert_same_bits(mine, eager)
    assert step._num_plans == 3


def test_more_values_than_are_remembered_are_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.capture.step_capture.MOST_ENTRIES", 3)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, batch["x"], batch["y"]) * batch["factor"]

    mine, eager = twins(net(), loss_fn, sgd)
    example = {**tensors(0), "factor": 1.0}
    step = packlight.fit(mine.model, loss_fn, mine.optimizer, example, moves=EXACT, progress=False)
    with pytest.warns(UserWarning, match="planned anew"):
        for index in range(8):
            batch = {**tensors(index), "factor": 1.0 + index}
            assert step(batch).item() == eager.step(batch).item()
    assert_same_bits(mine, eager)


def test_what_is_missing_in_a_batch_is_an_error_in_words_that_changes_nothing() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, batch["x"], batch["y"])

    mine, _ = twins(net(), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, tensors(0), moves=EXACT, progress=False
    )
    before = copy.deepcopy(mine.model.state_dict())
    for wrong in ({"x": tensors(0)["x"]}, {}, {"x": "text", "y": None}, 3, None):
        # Python's own where eager PyTorch runs a piece of the loss.
        with pytest.raises((PacklightError, TypeError, KeyError)):
            step(wrong)
    assert all(torch.equal(before[n], t) for n, t in mine.model.state_dict().items())
    step(tensors(1))


