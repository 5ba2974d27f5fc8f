"""Samples cut over ranks in a planned step: halos are operations of it, budgets each rank's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight.convolution import Spatial, parallelize_convolutions
from packlight.errors import InfeasibleBudgetError
from tests import convolution_models as models
from tests.convolution_cases import mesh_of
from tests.rank_pool import RankPool

PARALLEL = packlight.Parallel(space="rows")
MOVES = ("update-in-backward",)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests but one."""
    pool = RankPool(2, tmp_path_factory.mktemp("convolution"))
    yield pool
    pool.close()


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {"u-net": models.UNet, "u-net, small": models.SmallUNet, "vgg": models.Vgg}[
        name
    ]().double()


def batches_of(name: str, count: int = 3) -> list[Any]:
    """Return whole samples and labels."""
    generator = torch.Generator().manual_seed(1)
    channels, labels = (3, (2,)) if name == "vgg" else (1, (2, 32, 32))
    shape = (2, channels, 32, 32)
    return [
        (torch.randn(shape, generator=generator).double(),
         torch.randint(3, labels, generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained_alone(name: str) -> tuple[list[float], list[torch.Tensor]]:
    """Train on one device."""
    model, losses = model_of(name), []
    optimizer = optimizer_of(model)
    for batch in batches_of(name):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [t.detach() for t in model.state_dict().values()]


def split_model(name: str, mesh: Any) -> tuple[nn.Module, list[Any]]:
    """Return a model on this rank's rows, and its part of the batches."""
    model, batches = model_of(name), batches_of(name)
    split = parallelize_convolutions(model, mesh, Spatial(2), batches[0][0])
    if not split.is_cut_after:
        return model, [(split.part(x), y) for x, y in batches]
    return model, [(split.part(x), split.part(y, channels=False)) for x, y in batches]


def planned(name: str, budget: int | None) -> dict[str, Any]:
    """Train in a budget by fit."""
    mesh = mesh_of((2,))
    model, batches = split_model(name, mesh)
    optimizer = optimizer_of(model)
    step = packlight.fit(
        model, loss_of, optimizer, batches[0], budget, mesh=mesh, parallel=PARALLEL, moves=MOVES
    )
    losses = [float(step(batch)) for batch in batches[:-1]]
    measured = step.measured(batches[-1])
    graph = step.profile.graph
    exchanges = {o.id for o in graph.operations if "_rows" in o.name and "join" not in o.name}
    joins = {o.id for o in graph.operations if "join_rows" in o.name}
    again = graph.reruns(step.plan.schedule).keys()
    return {
        "losses": [*losses, float(measured.loss)],
        "state": [t.detach() for t in model.state_dict().values()],
        "peak": measured.peak_bytes, "predicted": step.peak_bytes,
        "exchanges": len(exchanges), "again": len(exchanges & again), "joins": len(joins & again),
        "words": step.describe(), "schedule": repr(step.plan.schedule),
    }


def smallest_alone(name: str) -> int:
    """Return the smallest budget of one device's step, by recomputation."""
    model = model_of(name)
    with pytest.raises(InfeasibleBudgetError) as refused:
        packlight.plan(model, loss_of, optimizer_of(model), batches_of(name)[0], 1, moves=MOVES)
    return refused.value.smallest_bytes


@pytest.mark.parametrize(
    "name", ["u-net, small", pytest.param("u-net", marks=pytest.mark.slow)]
)
def test_rows_and_recomputation_meet_a_budget_that_neither_meets_alone(
    pool: RankPool, name: str
) -> None:
    plain = pool.run(planned, name, None)
    recompute_alone, rows_alone = smallest_alone(name), plain[0]["predicted"]
    budget = int(0.85 * min(recompute_alone, rows_alone))
    both = pool.run(planned, name, budget)
    losses, state = trained_alone(name)
    for found in (*plain, *both):
        assert found["losses"] == pytest.approx(losses, rel=1e-12)
        for mine, other in zip(found["state"], state, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        assert found["predicted"] - 256 <= found["peak"] <= found["predicted"]
        assert found["exchanges"] >= 6
    for found in both:
        assert found["peak"] <= budget
        assert found["joins"] > 0 and "recomputed" in found["words"]
    assert both[0]["schedule"] == both[1]["schedule"]


def test_a_classifier_with_dropout_trains_as_one_rank_does(pool: RankPool) -> None:
    first, second = pool.run(planned_and_eager)
    for planned_losses, eager_losses in (first, second):
        assert planned_losses == pytest.approx(eager_losses, rel=1e-12)
    assert first == second


def planned_and_eager() -> tuple[list[float], list[float]]:
    """Train the same by fit and by DistributedDataParallel, dropout drawing the same seeds."""
    mesh = mesh_of((2,))
    model, batches = split_model("vgg", mesh)
    step = packlight.fit(
        model, loss_of, optimizer_of(model), batches[0], mesh=mesh, parallel=PARALLEL, moves=MOVES
    )
    torch.manual_seed(3)
    losses = [float(step(batch)) for batch in batches]
    model, batches = split_model("vgg", mesh)
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group())
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    eager = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(wrapped, batch)
        loss.backward()
        optimizer.step()
        eager.append(float(loss.detach()))
    return losses, eager


def both_planned() -> list[float]:
    """Train on two ranks with a sample each, cut over two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("samples", "rows"))
    model, batches = model_of("u-net, small"), batches_of("u-net, small")
    split = parallelize_convolutions(model, mesh["rows"], Spatial(2), batches[0][0])
    place = mesh["samples"].get_local_rank()
    batches = [
        (split.part(x[place : place + 1]), split.part(y[place : place + 1], channels=False))
        for x, y in batches
    ]
    step = packlight.fit(
        model, loss_of, optimizer_of(model), batches[0], mesh=mesh, moves=MOVES,
        parallel=packlight.Parallel(space="rows", data="samples"),
    )
    return [float(step(batch)) for batch in batches]


@pytest.mark.slow
def test_samples_and_rows_are_shared_on_one_mesh(tmp_path: Any) -> None:
    pool = RankPool(4, tmp_path)
    try:
        results = pool.run(both_planned)
    finally:
        pool.close()
    # (batch norm sees the samples of its rows' ranks alone, as with data parallel)
    assert all(losses == results[0] for losses in results)
    assert results[0] == pytest.approx(trained_by_halves(), rel=1e-12)


def trained_by_halves() -> list[float]:
    """Train on one device, one sample after the other."""
    model, losses = model_of("u-net, small"), []
    optimizer = optimizer_of(model)
    for x, y in batches_of("u-net, small"):
        optimizer.zero_grad()
        both = [loss_of(model, (x[i : i + 1], y[i : i + 1])) / 2 for i in range(2)]
        sum(both).backward()
        optimizer.step()
        losses.append(float(sum(both).detach()))
    return losses


def attempted(what: str) -> None:
    mesh = mesh_of((2,))
    model, batches = split_model("u-net, small", mesh)
    options: dict[str, Any] = {"mesh": mesh, "parallel": PARALLEL}
    if what == "nobody":
        options["parallel"] = packlight.Parallel(data="rows")
    elif what == "names":
        options["parallel"] = packlight.Parallel(space="columns")
    elif what == "both":
        options["parallel"] = packlight.Parallel(space="rows", tensor="rows")
    elif what == "uneven":
        model = model_of("u-net, small")
        x, y = (t[..., :30, :] for t in batches_of("u-net, small")[0])
        split = parallelize_convolutions(model, mesh, Spatial(2), x)
        batches = [(split.part(x), split.part(y, channels=False))]
    packlight.fit(model, loss_of, optimizer_of(model), batches[0], **options)


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("nobody", "UnsupportedModelError", "the loss talks to other ranks"),
        ("names", "OptionError", "the mesh has dimensions rows, and parallel= says what columns"),
        ("both", "OptionError", "space= beside tensor= or shard="),
        ("uneven", "RankMismatchError", "of the captured step"),
    ],
)
def test_what_cannot_be_planned_is_said_on_all_ranks(
    pool: RankPool, what: str, kind: str, words: str
) -> None:
    pool.assert_refused(words, attempted, what, kind=kind)
