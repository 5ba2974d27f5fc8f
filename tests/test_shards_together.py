"""Two ranks with parameters in pieces look at all gradients together: norms, scales, parts.

The oracle is one process on the whole batch, in eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.moves import data_parallel
from packlight.moves.data_parallel import DataParallel
from packlight.moves.microbatch.move import Microbatch
from packlight.search.search import Search
from tests.rank_pool import RankPool, mesh, part
from tests.test_ranks import assert_close, assert_same_bits, loss_of, model_of, whole_batches

SHARDED = packlight.Parallel(shard="data")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("together"))
    yield pool
    pool.close()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, which shows every factor that a gradient gets."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(
    name: str, rows: int, budget: int | None, options: dict[str, Any], masked: bool = False
) -> dict[str, Any]:
    """Train three steps on a rank's parts of batches, and say what became of it."""
    model = model_of(name)
    optimizer = optimizer_of(model)
    scale, pieces = options.pop("scale", None), options.pop("pieces", "parameter")
    parallel = packlight.Parallel(shard="data", pieces=pieces)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    batches = [part(batch) for batch in whole_batches(name, rows, 3, masked)]
    step = packlight.fit(
        model, loss_of, optimizer, batches[0], budget, mesh=mesh(), parallel=parallel,
        scaler=scaler, **options,
    )
    losses = [float(step(batch)) for batch in batches[:-1]]
    measured = step.measured(batches[-1])
    with step.whole_parameters():
        parameters = [p.detach().clone() for p in model.parameters()]
    made = step.way.made(DataParallel)
    return {
        "losses": [*losses, float(measured.loss)],
        "parameters": parameters,
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "resident": step.way.memory.resident_bytes,
        "num_microbatches": step.way.num_microbatches,
        "sums_each": made.sums_each if isinstance(made, DataParallel) else None,
        "scale": None if scaler is None else scaler.get_scale(),
    }


def trained_alone(
    name: str, rows: int, norm: float | None = None, masked: bool = False
) -> dict[str, Any]:
    """Train the same in one process on whole batches, by eager PyTorch."""
    model = model_of(name)
    optimizer = optimizer_of(model)
    losses = []
    for batch in whole_batches(name, rows, 3, masked):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "parameters": [p.detach() for p in model.parameters()]}


def assert_ranks_are_one(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """All ranks have the numbers of one process, within what was predicted."""
    for result in results:
        assert_close(result, alone)
        assert result["peak"] <= result["predicted"]
    assert_same_bits(*results)


@pytest.mark.parametrize(
    "name, norm", [("mlp", 0.05), ("mlp", 1e6), pytest.param("gpt", 0.05, marks=slow)]
)
def test_the_norm_of_all_gradients_clips_all_pieces(
    pool: RankPool, name: str, norm: float
) -> None:
    results = pool.run(trained, name, 8, None, {"clip_grad_norm": norm})
    assert_ranks_are_one(results, trained_alone(name, 8, norm))
    # Whole gradients are there for a moment only: the rank with most is as large as predicted.
    assert max(r["peak"] for r in results) >= results[0]["predicted"] - 256


@slow
def test_a_budget_is_kept_with_clipped_pieces(pool: RankPool) -> None:
    options = {"clip_grad_norm": 0.05, "moves": ("pack",)}
    free = pool.run(trained, "gpt", 8, None, options)
    resident = free[0]["resident"]
    budget = resident + 7 * (free[0]["predicted"] - resident) // 10
    for rank, planned in enumerate(pool.run(trained, "gpt", 8, budget, options)):
        assert_same_bits(free[rank], planned)
        assert planned["peak"] <= planned["predicted"] <= budget


def test_a_scaler_scales_pieces_and_clipping_comes_behind_it(pool: RankPool) -> None:
    results = pool.run(trained, "mlp", 8, None, {"scale": 1024.0, "clip_grad_norm": 0.05})
    assert_ranks_are_one(results, trained_alone("mlp", 8, 0.05))
    assert {r["scale"] for r in results} == {1024.0}


def overflowing() -> dict[str, Any]:
    """Have gradients of the last row, which one rank has, overflow where the loss is finite."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) * batch[1]).sum()

    weights = torch.ones(4, 64)
    weights[:, 63] = 3e38
    batch = torch.tensor([1.0, -1.0]).repeat(4, 32), weights
    step = packlight.fit(
        model, loss_fn, optimizer, batch, mesh=mesh(), parallel=SHARDED, scaler=scaler
    )
    before = [p.detach().clone() for p in model.parameters()]
    loss = float(step(batch))
    return {
        "loss": loss,
        "is_untouched": all(map(torch.equal, before, model.parameters())),
        "scale": scaler.get_scale(),
    }


def test_an_overflow_on_one_rank_skips_the_update_of_all(pool: RankPool) -> None:
    for result in pool.run(overflowing):
        assert result == {"loss": 0.0, "is_untouched": True, "scale": 2.0}


@contextmanager
def in_microbatches(count: int, sums_each: bool | None) -> Iterator[None]:
    """Have batches run in so many microbatches, and be accumulated so, whatever is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_starts", lambda self: iter([(Microbatch(count),)]))
        if sums_each is not None:
            patch.setattr(data_parallel, "_settings", lambda *_: [(1.0, None, sums_each)])
        yield


def trained_in_microbatches(
    rows: int, sums_each: bool | None, options: dict[str, Any], budget: int | None = None
) -> dict[str, Any]:
    with in_microbatches(3, sums_each):
        return trained("gpt", rows, budget, options, masked=True)


# Accumulated whole and added up once, or in pieces and each time; parts of other sizes.
@pytest.mark.parametrize(
    "pieces, rows, sums_each, norm",
    [
        ("state", 16, False, None),
        ("gradient", 15, True, 0.05),
        pytest.param("gradient", 16, False, 0.05, marks=slow),
        pytest.param("parameter", 15, True, None, marks=slow),
        pytest.param("parameter", 16, False, None, marks=slow),
    ],
)
def test_microbatches_are_accumulated_whole_or_in_pieces(
    pool: RankPool, pieces: str, rows: int, sums_each: bool, norm: float | None
) -> None:
    options = {"moves": ("microbatch",), "pieces": pieces, "clip_grad_norm": norm}
    results = pool.run(trained_in_microbatches, rows, sums_each, options)
    assert_ranks_are_one(results, trained_alone("gpt", rows, norm, masked=True))
    for result in results:
        assert result["num_microbatches"] == 3 and result["sums_each"] is sums_each


@slow
def test_a_budget_decides_how_microbatches_are_accumulated(pool: RankPool) -> None:
    options = {"moves": ("microbatch",), "pieces": "gradient"}
    free = pool.run(trained, "gpt", 32, None, {**options, "moves": ()})
    accumulated = sum(p.nbytes for p in free[0]["parameters"])
    left = free[0]["predicted"] - free[0]["resident"]
    for share, sums_each in ((1.0, False), (0.7, True)):  # of whole gradients
        budget = free[0]["resident"] + int(share * accumulated) + left // (2 if share == 1 else 6)
        results = pool.run(trained_in_microbatches, 32, None, options, budget)
        assert_ranks_are_one(results, trained_alone("gpt", 32, masked=True))
        for result in results:
            assert result["sums_each"] is sums_each and result["predicted"] <= budget


@pytest.mark.parametrize("pieces", ["gradient", pytest.param("parameter", marks=slow)])
def test_uneven_parts_run_one_schedule(pool: RankPool, pieces: str) -> None:
    options = {"moves": ("microbatch",), "pieces": pieces}
    results = pool.run(trained, "gpt", 7, None, options, True)
    assert_ranks_are_one(results, trained_alone("gpt", 7, masked=True))
    assert results[0]["predicted"] > results[1]["predicted"]
