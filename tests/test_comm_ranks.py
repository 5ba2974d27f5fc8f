"""Compressed gradients on two and three gloo ranks, beside one process; ranks that differ."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from packlight.comm import (
    CompressedAverage,
    LocalSteps,
    OneBitAdam,
    OneBitMomentum,
    Schedule,
    Transport,
    WireCounter,
    compressor_of,
    diloco,
    hook,
    reduce_here,
)
from packlight.errors import FormatError, OptionError, RankMismatchError
from tests.rank_pool import Raised, RankPool
from tests.test_comm import EVERY, gradient, states_of

SHAPE = (40, 33)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests that leave them well."""
    pool = RankPool(2, tmp_path_factory.mktemp("pair"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(3, tmp_path_factory.mktemp("three"))
    yield pool
    pool.close()


@pytest.fixture(params=["pair", "three"])
def pool(request: pytest.FixtureRequest) -> RankPool:
    pool: RankPool = request.getfixturevalue(request.param)
    return pool


def size_of(pool: RankPool) -> int:
    return len(pool.processes)


# -- averages, beside the oracle of one process


def averages_on_rank(names: list[str], num_steps: int) -> dict[str, list[torch.Tensor]]:
    rank, found = dist.get_rank(), {}
    transport = Transport()
    for name in names:
        average = CompressedAverage({"w": torch.zeros(SHAPE)}, EVERY[name], transport)
        average.states = {"w": EVERY[name].init(torch.zeros(SHAPE), number=3, rank=rank)}
        found[name] = [
            average.average({"w": gradient(SHAPE, 10 * step + rank)})["w"]
            for step in range(num_steps)
        ]
    return found


def test_ranks_average_to_the_bits_of_one_process(pool: RankPool) -> None:
    results = pool.run(averages_on_rank, list(EVERY), 5)
    for name, compressor in EVERY.items():
        states = states_of(compressor, SHAPE, size_of(pool))
        for step in range(5):
            gradients = [gradient(SHAPE, 10 * step + rank) for rank in range(size_of(pool))]
            average, states = reduce_here(compressor, gradients, states)
            for rank, result in enumerate(results):
                assert torch.equal(result[name][step], average), (name, step, rank)


def uneven_on_rank(text: str, together: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    shapes = {"a": (65, 3), "empty": (0, 4), "b": (7,), "scalar": (), "c": (300,)}
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    transport = Transport()
    average = CompressedAverage(parameters, text, transport, [list(shapes)] if together else None)
    gradients = {
        name: gradient(shape, len(name) + dist.get_rank()).bfloat16()
        for name, shape in shapes.items()
    }
    counter, before = WireCounter(), transport.sent_bytes
    averages = average.average(gradients)
    return averages, transport.sent_bytes - before, counter.sent_bytes()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("text", ["fp32", "q8", "topk:0.1+q2", "sketch:0.05"])
def test_many_uneven_bf16_tensors_share_one_exchange(
    pool: RankPool, text: str, together: bool
) -> None:
    results = pool.run(uneven_on_rank, text, together)
    for averages, sent, on_wire in results:
        for name, value in averages.items():
            assert torch.equal(value, results[0][0][name])
        assert sent <= on_wire <= sent + 64 * 8 * size_of(pool), "gloo adds a header to each"
    for name, value in results[0][0].items():
        inputs = [gradient(tuple(value.shape), len(name) + r) for r in range(size_of(pool))]
        true = torch.stack([t.bfloat16().float() for t in inputs]).mean(0)
        if text == "fp32":
            torch.testing.assert_close(value, true)
        elif text == "q8":
            torch.testing.assert_close(value, true, atol=0.02, rtol=0)


# -- in DDP


class Net(nn.Module):
    """The same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def batch_of(step: int, rank: int) -> torch.Tensor:
    return gradient((4, 8), 100 * step + rank)


def trained_in_ddp(
    choice: Any, num_steps: int, stop: int | None = None, dtype: torch.dtype = torch.float32,
    together: bool = False,
) -> list[torch.Tensor]:
    """Train in DDP; at step `stop` go on with new objects and what was saved."""

    def start() -> tuple[DistributedDataParallel, Any, torch.optim.Optimizer]:
        model = DistributedDataParallel(Net().to(dtype), bucket_cap_mb=0.002)
        communication = None
        if choice is not None:
            communication = hook(model, choice, together=together)
        return model, communication, torch.optim.SGD(model.parameters(), lr=0.1)

    model, communication, optimizer = start()
    for step in range(num_steps):
        if step == stop:
            saved = copy.deepcopy((model.state_dict(), communication.state_dict()))
            model, communication, optimizer = start()
            model.load_state_dict(saved[0])
            communication.load_state_dict(saved[1])
        optimizer.zero_grad()
        model(batch_of(step, dist.get_rank()).to(dtype)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("together", [False, True])
def test_the_fp32_hook_is_ddp(pool: RankPool, together: bool) -> None:
    plain = pool.run(trained_in_ddp, None, 4)[0]
    hooked = pool.run(trained_in_ddp, "fp32", 4, None, torch.float32, together)
    for values in hooked:
        for value, expected in zip(values, plain, strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("choice", ["topk:0.05+q2", {"*.bias": "fp32", "*": "q1"}], ids=str)
def test_training_resumes_to_the_last_bit_with_residuals(
    pair: RankPool, choice: Any, together: bool
) -> None:
    through = pair.run(trained_in_ddp, choice, 6, None, torch.float32, together)
    resumed = pair.run(trained_in_ddp, choice, 6, 3, torch.float32, together)
    for values in (*through, *resumed):
        for value, expected in zip(values, through[0], strict=True):
            assert torch.equal(value, expected)


def test_bf16_gradients_stay_bf16(pair: RankPool) -> None:
    for values in pair.run(trained_in_ddp, "q8", 2, None, torch.bfloat16):
        assert all(value.dtype == torch.bfloat16 for value in values)


def one_bit_adam_on_rank(num_steps: int, warmup_steps: int) -> list[torch.Tensor]:
    model = DistributedDataParallel(Net())
    hook(model, OneBitMomentum(warmup_steps, compressor_of("fp32")))
    optimizer = OneBitAdam(model.parameters(), 0.01, weight_decay=0.1, warmup_steps=warmup_steps)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(batch_of(step, dist.get_rank())).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_one_bit_adam_is_adamw_at_first_and_then_freezes_the_second_moment(pair: RankPool) -> None:
    """Oracle: both phases written out, on the average gradient of one process."""
    found = pair.run(one_bit_adam_on_rank, 7, 4)[0]
    model = Net()
    weights = [p.detach().clone().double() for p in model.parameters()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for step in range(7):
        for p, w in zip(model.parameters(), weights, strict=True):
            p.data.copy_(w)
        model.zero_grad()
        (sum(model(batch_of(step, rank)) for rank in range(2)) / 2).backward()
        for p, w, m, v in zip(model.parameters(), weights, first, second, strict=True):
            g = p.grad.double()  # type: ignore[union-attr]
            m.mul_(0.9).add_(0.1 * g)
            if step < 4:
                v.mul_(0.95).add_(0.05 * g.square())
            correction = 1 - 0.9 ** (step + 1) if step < 4 else 1.0
            root = (v / (1 - 0.95 ** min(step + 1, 4))).sqrt() + 1e-8
            w.mul_(1 - 0.01 * 0.1).sub_(0.01 * m / correction / root)
    for value, expected in zip(found, weights, strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)


# -- ranks that differ, fail, or are given what cannot be sent


def average_of(kind: str) -> None:
    rank = dist.get_rank()
    name = "other" if rank and kind == "name" else "w"
    shape = (3,) if rank and kind == "shape" else (2,)
    text = "q4" if rank and kind == "compressor" else "q8"
    text = "q5" if rank and kind == "word" else text
    parameters = {name: torch.zeros(shape)}
    if rank and kind == "count":
        parameters["more"] = torch.zeros(1)
    if kind == "schedule":
        diloco(Net(), every=3 + rank)
    if kind == "weight":
        LocalSteps(Net(), Schedule(), weight=-float(rank))
    CompressedAverage(parameters, text, Transport())


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("name", RankMismatchError, "the name of parameter 'w'"),
        ("shape", RankMismatchError, "the shape of parameter 'w'"),
        ("compressor", RankMismatchError, "the compressor of parameter 'w'"),
        ("count", RankMismatchError, "the number of parameters"),
        ("word", OptionError, "unknown compressor 'q5'"),
        ("schedule", RankMismatchError, "the schedule"),
        ("weight", OptionError, "on rank 1"),
    ],
)
def test_ranks_that_differ_are_named_before_anything_runs(
    pair: RankPool, kind: str, error: type, words: str
) -> None:
    for raised in pair.outcomes(average_of, kind):
        assert isinstance(raised, Raised) and raised.kind == error.__name__
        assert words in raised.text


def fails_on_rank(kind: str) -> None:
    parameters = {"w": torch.zeros(5, 5)}
    average = CompressedAverage(parameters, "q8", Transport(timeout_seconds=60))
    if kind == "sparse" and dist.get_rank():
        average.average({"w": torch.eye(5).to_sparse()})
    average.average({"w": torch.eye(5)})


def test_what_fails_on_one_rank_ends_the_others_with_its_words(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    pool = RankPool(2, tmp_path_factory.mktemp("failing"))
    first, second = pool.outcomes(fails_on_rank, "sparse")
    pool.close()
    assert isinstance(second, Raised) and second.kind == "OptionError"
    assert "hint: make it dense" in second.text
    assert isinstance(first, Raised) and first.kind == "RankError"
    assert "is sparse" in first.text


def dies_in_backward(at: int) -> list[Any]:
    model = DistributedDataParallel(Net())
    communication = hook(model, "topk:0.1", timeout_seconds=60)
    saved: Any = None
    for step in range(4):
        if step == at and dist.get_rank():
            os._exit(1)
        try:
            model(batch_of(step, dist.get_rank())).backward()
        except Exception as error:
            return [type(error).__name__, str(error), saved is not None]
        saved = communication.state_dict()
    return []


def test_a_rank_that_dies_in_a_step_is_an_error_on_the_others(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    pool = RankPool(2, tmp_path_factory.mktemp("dying"))
    alive, dead = pool.outcomes(dies_in_backward, 2)
    pool.close()
    assert dead is None
    assert "another rank is gone" in alive[1] and alive[2], alive


def loads_on_rank(change: dict[str, Any]) -> None:
    average = CompressedAverage({"w": torch.zeros(4)}, "q8", Transport())
    average.load_state_dict({**average.state_dict(), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": 5}, "saved by 5 ranks"),
        ({"rank": 7}, "residuals of rank 7"),
        ({"compressors": {"w": "Sign()"}}, "was saved with Sign()"),
    ],
)
def test_residuals_of_other_ranks_are_refused(
    pair: RankPool, change: dict[str, Any], words: str
) -> None:
    for raised in pair.outcomes(loads_on_rank, change):
        assert isinstance(raised, Raised) and raised.kind == FormatError.__name__
        assert words in raised.text


def refused_on_rank() -> list[str]:
    texts = []
    for attempt in (
        lambda: hook(Net(), "q8"),  # type: ignore[arg-type]
        lambda: hook(DistributedDataParallel(Net()), {"*.bias": "fp32"}),
        lambda: hook(DistributedDataParallel(Net()), "powersgd:1", together=True),
    ):
        try:
            attempt()
        except OptionError as error:
            texts.append(str(error))
    return texts


def test_what_cannot_be_hooked_says_why(pair: RankPool) -> None:
    texts = pair.run(refused_on_rank)[0]
    assert "hint: packlight.comm.hook(DistributedDataParallel(model), ...)" in texts[0]
    assert "'*': 'fp32'" in texts[1] and "needs matrices" in texts[2]


def test_without_a_process_group_there_is_an_error_that_says_so() -> None:
    with pytest.raises(OptionError, match="init_process_group"):
        Transport()
