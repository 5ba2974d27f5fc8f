"""What of parameters lies in pieces (ZeRO-1, 2, 3): the bits are the same, the bytes are fewer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import packlight
from packlight.errors import OptionError
from packlight.moves import data_parallel
from packlight.moves.data_parallel import DataParallel
from tests.rank_pool import RankPool, mesh, part
from tests.test_ranks import assert_same_bits, loss_of, whole_batches
from tests.test_shards import made, trained_by_ddp

PLACEMENTS = ("state", "gradient", "parameter")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("placements"))
    yield pool
    pool.close()


def trained(
    name: str, kind: str, pieces: str | None, budget: int | None = None,
    options: dict[str, Any] | None = None, directory: str | None = None,
) -> dict[str, Any]:
    """Train three steps on a rank's parts, and say what became of it; save after two of them."""
    model, optimizer = made(name, kind)
    options = dict(options or {"moves": ("update-in-backward",)})
    rows = options.pop("rows", 8)
    batches = [part(batch) for batch in whole_batches(name, rows, 3)]
    parallel = None if pieces is None else packlight.Parallel(shard="data", pieces=pieces)
    step = packlight.fit(
        model, loss_of, optimizer, batches[0], budget, mesh=mesh(), parallel=parallel,
        **options,
    )
    for batch in batches[:-1]:
        step(batch)
    if directory is not None:
        step.save(directory)
        step.load(directory)
    measured = step.measured(batches[-1])
    way = step.way.made(DataParallel)
    assert isinstance(way, DataParallel)
    shapes = [tuple(p.shape) for p in model.parameters()]
    with step.whole_parameters():
        parameters = [p.detach().clone() for p in model.parameters()]
    return {
        "parameters": parameters,
        "shapes": shapes,
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "resident": step.way.memory.resident_bytes,
        "num_gathered": len(way.gathered),
        "num_in_pieces": len(way.in_pieces),
        "words": step.describe(),
    }


def assert_as_predicted(results: list[dict[str, Any]]) -> None:
    """No rank takes more, and the one that has most takes that."""
    peaks = [result["peak"] for result in results]
    assert results[0]["predicted"] - 64 <= max(peaks) <= results[0]["predicted"]


@pytest.mark.parametrize("name, kind", [("mlp", "sgd"), ("gpt", "adamw"), ("mlp", "8bit")])
def test_states_in_pieces_have_ddp_s_bits_and_whole_parameters(
    pool: RankPool, name: str, kind: str
) -> None:
    mine, theirs = pool.run(trained, name, kind, "state"), pool.run(trained_by_ddp, name, kind)
    whole = [tuple(p.shape) for p in made(name, kind)[0].parameters()]
    for rank in range(2):
        assert_same_bits(mine[rank], theirs[rank])
        assert mine[rank]["shapes"] == whole
    assert_as_predicted(mine)
    assert mine[0]["resident"] < theirs[0]["held"]


def clipped_with_one_bucket_at_a_time(pieces: str) -> dict[str, Any]:
    """Train with few activations, clip the norm, and wait for each sum before the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "_settings", lambda *_: [(0.0, 0, False)])
        options = {"moves": (), "clip_grad_norm": 0.05, "rows": 4}
        return trained("gpt", "sgd", pieces, None, options)


def test_gradients_in_pieces_wait_for_the_norm_in_fewer_bytes(pool: RankPool) -> None:
    whole, own = (
        pool.run(clipped_with_one_bucket_at_a_time, pieces) for pieces in ("state", "gradient")
    )
    for results in (whole, own):
        assert_as_predicted(results)
        assert_same_bits(results[0], results[1])
    assert_same_bits(whole[0], own[0])
    assert own[0]["predicted"] < whole[0]["predicted"]


@pytest.mark.slow
def test_a_budget_decides_how_much_lies_in_pieces(pool: RankPool) -> None:
    free = pool.run(trained, "mlp", "adamw", "planned")
    all_of_it = pool.run(trained, "mlp", "adamw", "parameter")
    tight = all_of_it[0]["predicted"]
    between = (free[0]["predicted"] + tight) // 2
    for budget in (between, tight):
        found = pool.run(trained, "mlp", "adamw", "planned", budget)
        assert_same_bits(found[0], free[0])
        assert max(result["peak"] for result in found) <= found[0]["predicted"] <= budget
    assert_same_bits(all_of_it[0], free[0])
    assert free[0]["num_gathered"] == 0


def test_states_in_pieces_are_saved_and_loaded(pool: RankPool, tmp_path: Path) -> None:
    directory = str(tmp_path / "checkpoint")
    mine = pool.run(trained, "mlp", "adamw", "state", None, None, directory)
    theirs = pool.run(trained_by_ddp, "mlp", "adamw")
    assert_same_bits(mine[0], theirs[0])


def test_what_is_no_placement_is_said() -> None:
    with pytest.raises(OptionError, match="state, gradient, parameter, planned"):
        packlight.Parallel(shard="data", pieces="zero3")


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_have_the_same_bits_wherever_parameters_lie(
    size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool = RankPool(size, tmp_path_factory.mktemp("more"))
    try:
        for name, kind in (("mlp", "adamw"), ("gpt", "sgd")):
            found = [pool.run(trained, name, kind, pieces) for pieces in PLACEMENTS]
            for results in found:
                for result in results:
                    assert_same_bits(result, found[0][0])
                    assert result["peak"] <= result["predicted"]
    finally:
        pool.close()
