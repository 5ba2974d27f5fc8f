"""Four ranks on a mesh of two dimensions: parts of the batch along one, of weights along the other.

What they train is compared with one process, and with the bits of one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import packlight
from packlight.errors import NonFiniteLossError
from packlight.moves.microbatch.move import Microbatch
from packlight.search.search import Search
from tests.rank_pool import RankPool

WIDTH, HIDDEN, CLASSES, ROWS, STEPS = 64, 128, 16, 8, 5
PARALLEL = {
    "data": packlight.Parallel(data="data", tensor="tensor"),
    "state": packlight.Parallel(shard="data", tensor="tensor", pieces="state"),
    "parameter": packlight.Parallel(shard="data", tensor="tensor"),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks for all tests."""
    pool = RankPool(4, tmp_path_factory.mktemp("two"))
    yield pool
    pool.close()


class Residual(nn.Module):
    """Two hidden layers around which the input goes; norms are whole on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Residual(), Residual(), nn.Linear(WIDTH, CLASSES))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def split(mesh: DeviceMesh) -> nn.Module:
    model = network()
    plan = {f"{i}.up": ColwiseParallel() for i in range(2)}
    plan |= {f"{i}.down": RowwiseParallel() for i in range(2)}
    return packlight.localize(parallelize_module(model, mesh["tensor"], plan))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100)


def batches(count: int = STEPS) -> list[Any]:
    """Return whole batches; in one half more labels count than in the other."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        labels[0] = -100
        made.append((torch.randn(ROWS, WIDTH, generator=generator), labels))
    return made


def mine(batch: Any, mesh: DeviceMesh) -> Any:
    return tuple(t.chunk(2)[mesh.get_local_rank("data")].clone() for t in batch)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, which shows every factor that a gradient gets."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole_values(model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters that the model reads, whole on all ranks."""
    found = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            for value in (module.weight, module.bias):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                found.append(whole.detach().clone())
    return found


def trained(how: str, budget_share: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """Train some steps, within a share of what the step takes beside what is always there."""
    both = mesh()
    own = [mine(batch, both) for batch in batches()]

    def fitted(budget: int | None) -> tuple[nn.Module, packlight.TrainStep]:
        model = split(both)
        step = packlight.fit(
            model, loss_of, optimizer_of(model), own[0], budget, mesh=both, parallel=PARALLEL[how],
            **options,
        )
        return model, step

    budget = None
    if budget_share is not None:
        _, free = fitted(None)
        resident = free.way.memory.resident_bytes
        budget = resident + int(budget_share * (free.peak_bytes - resident))
    model, step = fitted(budget)
    losses = [float(step(batch)) for batch in own[:-1]]
    measured = step.measured(own[-1])
    with step.whole_parameters():
        values = whole_values(model)
    return {
        "losses": [*losses, float(measured.loss)],
        "values": values,
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "budget": budget,
        "resident": step.way.memory.parameter_bytes,
        "way": repr(step.way.parts[0].plan.schedule),
        "num_microbatches": step.way.num_microbatches,
    }


def trained_alone(norm: float | None = None) -> dict[str, Any]:
    model = network()
    optimizer = optimizer_of(model)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "values": whole_values(model)}


def assert_ranks_are_one(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert result["way"] == results[0]["way"]
        assert result["peak"] <= result["predicted"]
        for value, expected in zip(result["values"], alone["values"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, result["values"], results[0]["values"]))


@pytest.mark.parametrize(
    "how, share, norm",
    [
        ("data", None, None),
        ("parameter", None, 0.05),
        pytest.param("data", 0.7, 0.05, marks=pytest.mark.slow),
        pytest.param("state", None, None, marks=pytest.mark.slow),
        pytest.param("parameter", 0.8, None, marks=pytest.mark.slow),
    ],
)
def test_parts_of_batch_and_of_weights_train_as_one_process(
    pool: RankPool, how: str, share: float | None, norm: float | None
) -> None:
    results = pool.run(trained, how, share, {"clip_grad_norm": norm})
    assert_ranks_are_one(results, trained_alone(norm))
    for result in results:
        assert share is None or result["predicted"] <= result["budget"]
    if how == "parameter":  # of the large weights, each rank has a quarter
        whole = sum(p.nbytes for p in network().parameters())
        assert results[0]["resident"] < 0.4 * whole


def trained_in_microbatches(how: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_starts", lambda self: iter([(Microbatch(2),)]))
        return trained(how, None, {})


@pytest.mark.parametrize("how", ["data", pytest.param("parameter", marks=pytest.mark.slow)])
def test_microbatches_of_parts_train_as_one_process(pool: RankPool, how: str) -> None:
    results = pool.run(trained_in_microbatches, how)
    assert_ranks_are_one(results, trained_alone())
    assert all(result["num_microbatches"] == 2 for result in results)


def saved(how: str, directory: str) -> tuple[list[torch.Tensor], list[float]]:
    """Train, save, train on; return values as saved, and the losses that follow."""
    both = mesh()
    model = split(both)
    own = [mine(batch, both) for batch in batches()]
    step = packlight.fit(
        model, loss_of, optimizer_of(model), own[0], mesh=both, parallel=PARALLEL[how]
    )
    for batch in own[:3]:
        step(batch)
    step.save(directory, {"step": 3})
    with step.whole_parameters():
        values = whole_values(model)
    return values, [float(step(batch)) for batch in own[3:]]


def gone_on(how: str, directory: str) -> list[float]:
    both = mesh()
    model = split(both)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    own = [mine(batch, both) for batch in batches()]
    step = packlight.fit(
        model, loss_of, optimizer_of(model), own[0], mesh=both, parallel=PARALLEL[how]
    )
    assert step.load(directory) == {"step": 3}
    return [float(step(batch)) for batch in own[3:]]


@pytest.mark.parametrize("how", ["parameter", pytest.param("data", marks=pytest.mark.slow)])
def test_parts_are_saved_and_loaded_by_ranks_and_by_one_process(
    pool: RankPool, how: str, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    results = pool.run(saved, how, str(directory))
    assert pool.run(gone_on, how, str(directory)) == [losses for _, losses in results]
    model = network()
    step = packlight.fit(model, loss_of, optimizer_of(model), batches(1)[0])
    step.load(directory)
    assert all(map(torch.equal, whole_values(model), results[0][0]))
    after = [float(step(batch)) for batch in batches()[3:]]
    assert after == pytest.approx(results[0][1], rel=1e-5)


def model_of_seed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES))


def trained_apart() -> tuple[int, list[float]]:
    """Train a model of one's own along each row of the mesh."""
    both = mesh()
    seed = both.get_local_rank("tensor")
    model, own = model_of_seed(seed), [mine(batch, both) for batch in batches()]
    step = packlight.fit(model, loss_of, optimizer_of(model), own[0], mesh=both["data"], moves=())
    return seed, [float(step(batch)) for batch in own]


def test_ranks_along_one_dimension_train_a_model_of_their_own(pool: RankPool) -> None:
    for seed, losses in pool.run(trained_apart):
        model = model_of_seed(seed)
        optimizer = optimizer_of(model)
        for batch, loss in zip(batches(), losses, strict=True):
            optimizer.zero_grad()
            expected = loss_of(model, batch)
            expected.backward()
            optimizer.step()
            assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def with_nan() -> bool:
    """Have the loss of one part of the batch be NaN; return whether nothing was changed."""
    both = mesh()
    model = split(both)
    own = mine(batches(1)[0], both)
    step = packlight.fit(
        model, loss_of, optimizer_of(model), own, mesh=both, parallel=PARALLEL["data"]
    )
    before = [p.detach().clone() for p in model.parameters()]
    broken = own
    if both.get_local_rank("data") == 1:
        broken = (torch.full_like(own[0], float("nan")), own[1])
    try:
        step(broken)
    except NonFiniteLossError as error:
        is_same = all(map(torch.equal, before, model.parameters()))
        return is_same and error.rank in (2, 3) and float(step(own)) > 0
    return False


def test_a_loss_that_is_nan_leaves_all_ranks_as_they_are(pool: RankPool) -> None:
    assert pool.run(with_nan) == [True] * 4


def attempted(what: str) -> None:
    both = mesh()
    own = mine(batches(1)[0], both)
    if what == "dimensions":
        packlight.Parallel(data="data", tensor="data")
    model = split(both)
    rank = both.get_rank()
    if what == "batch" and rank == 3:
        own = (own[0] + 1, own[1])
    if what == "weights" and rank == 2:  # whose part rank 0 has, too
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "original" in n).add_(1)
    packlight.fit(
        model, loss_of, optimizer_of(model), own, mesh=both, parallel=PARALLEL["data"]
    )


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("dimensions", "OptionError", "have either parts of the weights or parts of the batch"),
        ("batch", "RankMismatchError", "rank 3 differs from rank 2 in the batch"),
        ("weights", "RankMismatchError", "rank 2 differs from rank 0 in values of parameter"),
    ],
)
def test_what_does_not_fit_together_is_said_on_all_ranks(
    pool: RankPool, what: str, kind: str, words: str
) -> None:
    pool.assert_refused(words, attempted, what, kind=kind)
