"""Two ranks (gloo) with parameters in pieces: DDP's bits in fewer bytes, checkpoints for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight.errors import NonFiniteLossError
from packlight.optim import AdamW8bit
from packlight.ranks.link import faster
from packlight.run.distributed import load_distributed
from tests.rank_pool import RankPool, mesh, part
from tests.test_ranks import (
    assert_keeps_its_promise,
    assert_same_bits,
    loss_of,
    model_of,
    optimizer_of,
    whole_batches,
)

SHARDED = packlight.Parallel(shard="data")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("shards"))
    yield pool
    pool.close()


def made(name: str, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, the same in every process."""
    model = model_of(name)
    if kind == "8bit":
        return model, AdamW8bit(model.parameters(), lr=1e-2)
    if kind == "adafactor":  # what it does to a row depends on the others
        return model, torch.optim.Adafactor(model.parameters(), lr=1e-2)
    return model, optimizer_of(kind, model)


def fitted(
    name: str, kind: str, budget: int | None = None, count: int = 3
) -> tuple[packlight.TrainStep, list[Any]]:
    """Return a step with parameters in pieces, and a rank's parts of batches."""
    model, optimizer = made(name, kind)
    batches = [part(batch) for batch in whole_batches(name, 8, count)]
    step = packlight.fit(
        model, loss_of, optimizer, batches[0], budget, mesh=mesh(), parallel=SHARDED,
        moves=("update-in-backward",),
    )
    return step, batches


def trained(name: str, kind: str, budget: int | None) -> dict[str, Any]:
    """Train three steps on a rank's parts, and say what became of it."""
    step, batches = fitted(name, kind, budget)
    for batch in batches[:-1]:
        step(batch)
    measured = step.measured(batches[-1])
    shapes = [tuple(p.shape) for p in step.model.parameters()]
    with step.whole_parameters():
        parameters = [p.detach().clone() for p in step.model.parameters()]
    return {
        "parameters": parameters,
        "shapes": shapes,
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "resident": step.way.memory.resident_bytes,
        "evaluated": float(step.evaluate(batches[0])),
    }


def trained_by_ddp(name: str, kind: str, count: int = 3) -> dict[str, Any]:
    """Train the same with DistributedDataParallel."""
    model, optimizer = made(name, kind)
    wrapped = DistributedDataParallel(model)
    batches = [part(batch) for batch in whole_batches(name, 8, count)]
    for batch in batches:
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
    with torch.no_grad():
        evaluated = float(loss_of(model.eval(), batches[0]))
    states = [v for state in optimizer.state.values() for v in state.values()]
    held = [*model.parameters(), *(v for v in states if isinstance(v, torch.Tensor))]
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "evaluated": evaluated,
        "held": sum(tensor.nbytes for tensor in held),
    }


@pytest.mark.parametrize(
    "name, kind, share",  # (one rank has the largest matrix, which Adafactor needs whole)
    [("mlp", "sgd", 0.6), ("gpt", "adamw", 0.6), ("mlp", "8bit", 0.7), ("mlp", "adafactor", 0.9)],
)
def test_pieces_have_ddp_s_bits_in_as_many_bytes_as_predicted(
    pool: RankPool, name: str, kind: str, share: float
) -> None:
    mine, theirs = pool.run(trained, name, kind, None), pool.run(trained_by_ddp, name, kind)
    for rank in range(2):
        assert_same_bits(mine[rank], theirs[rank])
        assert mine[rank]["evaluated"] == theirs[rank]["evaluated"]
        assert mine[rank]["peak"] <= mine[rank]["predicted"]
    # The rank that has most is as large as was predicted; the other one may have a row less.
    assert_keeps_its_promise(max(mine, key=lambda one: one["peak"]), None)
    assert mine[0]["resident"] < share * theirs[0]["held"]


def test_a_budget_is_kept_with_the_same_bits(pool: RankPool) -> None:
    free = pool.run(trained, "gpt", "adamw", None)
    resident = free[0]["resident"]
    budget = resident + 7 * (free[0]["predicted"] - resident) // 10
    for rank, planned in enumerate(pool.run(trained, "gpt", "adamw", budget)):
        assert_same_bits(free[rank], planned)
        assert planned["peak"] <= planned["predicted"] <= budget


def test_between_steps_a_parameter_is_its_rank_s_rows(pool: RankPool) -> None:
    shapes = [result["shapes"] for result in pool.run(trained, "mlp", "sgd", None)]
    whole = [tuple(p.shape) for p in model_of("mlp").parameters()]
    for first, second, shape in zip(*shapes, whole, strict=True):
        if first != shape:
            assert first[0] + second[0] == shape[0]
            assert first[1:] == second[1:] == shape[1:]
    assert shapes[0] != whole


def cut_after_two_steps() -> dict[str, Any]:
    """Train two steps with DDP, and the third one in pieces."""
    model, optimizer = made("mlp", "adamw")
    wrapped = DistributedDataParallel(model)
    batches = [part(batch) for batch in whole_batches("mlp", 8, 3)]
    for batch in batches[:2]:
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    del wrapped
    step = packlight.fit(model, loss_of, optimizer, batches[2], mesh=mesh(), parallel=SHARDED)
    step(batches[2])
    with step.whole_parameters():
        return {"parameters": [p.detach().clone() for p in model.parameters()]}


def test_states_that_were_whole_are_cut(pool: RankPool) -> None:
    theirs = pool.run(trained_by_ddp, "mlp", "adamw")
    for rank, mine in enumerate(pool.run(cut_after_two_steps)):
        assert_same_bits(mine, theirs[rank])


# -- what cannot be


def refused(what: str) -> None:
    """Fit what cannot lie in pieces."""
    model, optimizer = made("mlp", "sgd")
    (batch,) = whole_batches("mlp", 8, 1)
    parallel = packlight.Parallel(data="other", shard="data") if what == "two" else SHARDED
    if what == "together":
        optimizer.register_step_pre_hook(lambda *_: None)
    packlight.fit(model, loss_of, optimizer, part(batch), mesh=mesh(), parallel=parallel)


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("together", "UnsupportedModelError", ("parameters cannot lie in pieces: ", "hook")),
        ("two", "OptionError", ("dimensions data,", "what data, other are for")),
    ],
)
def test_what_cannot_lie_in_pieces_is_said_on_all_ranks(
    pool: RankPool, what: str, kind: str, words: tuple[str, ...]
) -> None:
    pool.assert_refused(words, refused, what, kind=kind)


def trained_on_nan() -> tuple[str, bool, float]:
    """Give one rank a batch that is not finite, then go on."""
    step, batches = fitted("mlp", "sgd", count=2)
    before = [p.detach().clone() for p in step.model.parameters()]
    if dist.get_rank() == 1:
        batches[0][0][0, 0] = float("nan")
    try:
        step(batches[0])
        kind = "none"
    except NonFiniteLossError as error:
        kind = type(error).__name__
    is_untouched = all(map(torch.equal, before, step.model.parameters()))
    return kind, is_untouched, float(step(batches[1]))


def test_nan_on_one_rank_leaves_all_pieces_as_they_are(pool: RankPool) -> None:
    one, other = pool.run(trained_on_nan)
    assert one == other
    assert one[:2] == ("NonFiniteLossError", True)
    assert one[2] == one[2]


# -- checkpoints


def saved(kind: str, directory: str) -> dict[str, Any]:
    """Train two steps, save, train a third one."""
    step, batches = fitted("mlp", kind)
    for batch in batches[:2]:
        step(batch)
    step.save(directory, {"position": 2})
    step(batches[2])
    with step.whole_parameters():
        return {"parameters": [p.detach().clone() for p in step.model.parameters()]}


def resumed(kind: str, directory: str) -> dict[str, Any]:
    """Load what was saved after two steps, and train the third one."""
    step, batches = fitted("mlp", kind)
    extra = step.load(directory)
    step(batches[extra["position"]])
    with step.whole_parameters():
        return {"parameters": [p.detach().clone() for p in step.model.parameters()]}


@pytest.mark.parametrize("kind", ["adamw", "8bit"])
def test_saved_by_ranks_and_loaded_by_ranks_or_by_one_process(
    pool: RankPool, tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "checkpoint"
    went_on = pool.run(saved, kind, str(directory))
    assert_same_bits(went_on[0], pool.run(resumed, kind, str(directory))[0])
    # In a process that is alone: as DDP's after two steps, states included.
    model, optimizer = made("mlp", kind)
    assert load_distributed(directory, model, optimizer) == {"position": 2}
    theirs = pool.run(trained_by_ddp, "mlp", kind, 2)[0]
    assert_same_bits({"parameters": [*model.parameters()]}, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    third = whole_batches("mlp", 8, 3)[2]
    loss_of(model, third).backward()
    optimizer.step()  # on the whole batch: the same up to rounding
    for one, other in zip(model.parameters(), went_on[0]["parameters"], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_saved_by_one_process_and_loaded_by_ranks(pool: RankPool, tmp_path: Path) -> None:
    model, optimizer = made("mlp", "adamw")
    batches = whole_batches("mlp", 8, 3)
    step = packlight.fit(model, loss_of, optimizer, batches[0])
    for batch in batches[:2]:
        step(batch)
    step.save(tmp_path / "checkpoint", {"position": 2})
    step(batches[2])
    for result in pool.run(resumed, "adamw", str(tmp_path / "checkpoint")):
        for one, other in zip(result["parameters"], model.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


# -- the network's speed


def test_what_was_measured_beside_other_work_is_not_kept() -> None:
    quiet, loaded = [1e-4, 1e-9, 2e-4, 2e-9, 3e-4, 3e-9, 0.3], [1e-3, 5e-9] * 3 + [0.9]
    assert faster(loaded, quiet) == faster(quiet, loaded) == quiet
    one, other = [1e-4, 1e-9] * 3 + [0.2], [2e-4, 5e-10] * 3 + [0.4]
    assert faster(one, other) == [1e-4, 5e-10] * 3 + [0.4]
