"""Batches of many sizes are traced once with symbols and planned once for a bucket."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.capture.step_capture import StepCapture
from packlight.errors import InfeasibleBudgetError
from packlight.search.prepare import Preparer
from packlight.search.saved import graph_digest
from tests.oracles.eager_loop import assert_same_bits, twins

EXACT = ("update-in-backward", "pack")
WIDTH, VOCABULARY = 16, 32
Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Attention(nn.Module):
    """A transformer whose numbers depend on the length in every way that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(256, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, length = tokens.shape
        x = self.words(tokens) + self.places(torch.arange(length))
        q, k, v = self.qkv(self.norm(x)).view(rows, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf) / math.sqrt(length)
        mixed = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, length, -1)
        x = x + mixed + x.sum(1, keepdim=True) / length
        return self.out(F.gelu(x) * (1 + 1 / length) - self.places.weight[:length])


def next_word(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["tokens"][:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def words(length: int, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(length)
    shape = (rows, length + 1)
    return {"tokens": torch.randint(0, VOCABULARY, shape, generator=generator)}


class Convolutions(nn.Module):
    """Images of any size: padding, pooling, a skip, batch norm, a mean over places."""

    is_resized = False

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.into(images)))
        small = self.down(F.pad(x, (0, 1, 1, 0)))
        if self.is_resized:
            small = F.interpolate(small, size=x.shape[-2:], mode="nearest")
        return self.head(F.max_pool2d(x, 2).mean((2, 3)) - small.amax((2, 3)))


class Resized(Convolutions):
    """Upsampling is traced as eager's own kernels, which take no symbols."""

    is_resized = True


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def images(size: int, rows: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows, 3, size, size + 2, generator=generator)
    return {"x": x, "y": torch.randint(0, 4, (rows,), generator=generator)}


def vectors(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, WIDTH, generator=generator)
    return {"x": x, "y": torch.randint(0, 4, (rows,), generator=generator)}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int], Batch], list[int]]] = {
    "lengths": (Attention, next_word, words, [24, 20, 17, 32, 5, 23, 2, 1, 9]),
    "images": (Convolutions, classify, images, [12, 10, 16, 7, 9, 13]),
    "rows": (perceptron, classify, vectors, [64, 48, 33, 40, 2, 1, 63]),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


@pytest.mark.parametrize("case", CASES)
def test_a_trace_with_symbols_is_the_trace_with_numbers(case: str) -> None:
    make, loss_fn, batch_of, sizes = CASES[case]
    torch.manual_seed(0)
    model = make()
    first, second = batch_of(sizes[0]), batch_of(sizes[1])
    changing = {
        f"batch[{name!r}]": frozenset(
            dim for dim in range(t.ndim) if t.shape[dim] != second[name].shape[dim]
        )
        for name, t in first.items()
    }
    symbolic = StepCapture(loss_fn, model, {path: dims for path, dims in changing.items() if dims})
    for size in [size for size in sizes if size > 1]:
        mine = symbolic.capture(batch_of(size))
        theirs = StepCapture(loss_fn, model).capture(batch_of(size))
        assert graph_digest(mine.joint) == graph_digest(theirs.joint)
        assert [id(a) for a in mine.arguments[:-2]] == [id(a) for a in theirs.arguments[:-2]] or [
            a.shape for a in mine.arguments
        ] == [a.shape for a in theirs.arguments]
        assert mine.returned == theirs.returned and mine.written_back == theirs.written_back
    assert symbolic.num_traced == 1


@pytest.mark.parametrize("is_tight", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_batches_of_many_sizes_are_trained_exactly_and_within_the_budget(
    case: str, is_tight: bool
) -> None:
    make, loss_fn, batch_of, sizes = CASES[case]
    torch.manual_seed(0)
    mine, eager = twins(make(), loss_fn, sgd)
    budget = None
    if is_tight:
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.plan(
                mine.model, loss_fn, mine.optimizer, batch_of(max(sizes)), 1, moves=EXACT,
                progress=False,
            )
        budget = int(caught.value.smallest_bytes * 1.05)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(sizes[0]), budget, moves=EXACT,
        progress=False,
    )
    for seed, size in enumerate([*sizes, *sizes[:3]]):
        batch = batch_of(size)
        if "y" in batch and len(batch["y"]) == 1:
            continue  # batch norm needs more
        torch.manual_seed(seed)
        measured = step.measured(batch)
        torch.manual_seed(seed)
        assert measured.loss.item() == eager.step(batch).item(), size
        assert measured.peak_bytes <= step.peak_bytes + 64
        assert budget is None or measured.peak_bytes <= budget
    assert_same_bits(mine, eager)


def test_what_cannot_be_traced_with_symbols_is_traced_with_numbers() -> None:
    torch.manual_seed(0)
    mine, eager = twins(Resized(), classify, sgd)
    step = packlight.fit(
        mine.model, classify, mine.optimizer, images(12), moves=EXACT, progress=False
    )
    for size in (12, 10, 16, 7, 10):
        assert step(images(size)).item() == eager.step(images(size)).item()
    assert_same_bits(mine, eager)
    assert step._num_plans == 4


def test_one_search_serves_a_bucket_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = Preparer._searched

    def counted(self: Preparer, planner: Any) -> Any:
        searched.append(planner.batch["tokens"].shape[1] - 1)
        return search(self, planner)

    monkeypatch.setattr(Preparer, "_searched", counted)
    torch.manual_seed(0)
    mine, _ = twins(Attention(), next_word, sgd)
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(
            mine.model, next_word, mine.optimizer, words(64), 1, moves=EXACT, progress=False
        )
    searched.clear()
    step = packlight.fit(
        mine.model, next_word, mine.optimizer, words(64), int(caught.value.smallest_bytes * 1.05),
        moves=EXACT, progress=False,
    )
    slowdown = step.plan.slowdown
    for length in range(63, 30, -1):
        step(words(length))
        assert step.peak_bytes <= step.budget_bytes and step.plan.slowdown <= slowdown * 1.1
    assert len(searched) <= 5
    # What is shorter gets room to be faster.
    step(words(12))
    assert step.plan.slowdown <= 1.01
    assert step._num_plans == 3, "traced with numbers twice, then with symbols"


def test_code_that_looks_at_a_size_is_traced_for_each_branch() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = next_word(model, batch)
        if batch["tokens"].shape[1] > 12:
            return loss * 2
        return loss + batch["tokens"].shape[1] if batch["tokens"].shape[1] % 2 else loss

    torch.manual_seed(0)
    mine, eager = twins(Attention(), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, words(20), moves=EXACT, progress=False
    )
    for seed, length in enumerate([20, 18, 16, 9, 8, 7, 6, 14, 5, 21]):
        torch.manual_seed(seed)
        loss = step(words(length))
        torch.manual_seed(seed)
        assert loss.item() == eager.step(words(length)).item()
    assert_same_bits(mine, eager)


def test_shapes_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.run.train_step.MOST_SHAPES", 3)
    torch.manual_seed(0)
    mine, eager = twins(perceptron(), classify, sgd)
    step = packlight.fit(
        mine.model, classify, mine.optimizer, vectors(9), moves=EXACT, progress=False
    )
    for seed, rows in enumerate([9, 8, 7, 6, 5, 4, 9, 8, 4, 3, 9]):
        torch.manual_seed(seed)
        loss = step(vectors(rows))
        torch.manual_seed(seed)
        assert loss.item() == eager.step(vectors(rows)).item()
        assert len(step._runners) <= 3
    assert_same_bits(mine, eager)
