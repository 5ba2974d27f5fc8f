"""Hybrid sharding: groups of ranks that share pieces of parameters, and have the same in each.

Four ranks on a mesh of two dimensions train as one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import packlight
from packlight.errors import OptionError
from packlight.run.distributed import load_distributed
from tests.rank_pool import RankPool, part

WIDTH, HIDDEN, CLASSES, ROWS, STEPS = 64, 128, 16, 10, 3


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks for all tests."""
    pool = RankPool(4, tmp_path_factory.mktemp("hybrid"))
    yield pool
    pool.close()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(),
        nn.Linear(HIDDEN, CLASSES),
    )


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100)


def batches() -> list[Any]:
    """Return whole batches: parts of four ranks have other sizes, and count differently."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        labels[:2] = -100
        made.append((torch.randn(ROWS, WIDTH, generator=generator), labels))
    return made


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, which shows every factor that a gradient gets."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def in_groups(sizes: tuple[int, int] = (2, 2)) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replica", "shard"))


def trained(pieces: str, norm: float | None, share: float | None, directory: str) -> dict[str, Any]:
    """Train some steps, within a share of what the step takes beside what is always there."""
    mesh = in_groups()
    own = [part(batch) for batch in batches()]

    def fitted(budget: int | None) -> tuple[nn.Module, packlight.TrainStep]:
        model = network()
        step = packlight.fit(
            model, loss_of, optimizer_of(model), own[0], budget, mesh=mesh, clip_grad_norm=norm,
            parallel=packlight.Parallel(data="replica", shard="shard", pieces=pieces),
        )
        return model, step

    budget = None
    if share is not None:
        _, free = fitted(None)
        resident = free.way.memory.resident_bytes
        largest = torch.tensor(resident + int(share * (free.peak_bytes - resident)))
        dist.all_reduce(largest, dist.ReduceOp.MAX)  # all ranks name one budget
        budget = int(largest)
    model, step = fitted(budget)
    losses = [float(step(batch)) for batch in own[:-1]]
    measured = step.measured(own[-1])
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    step.save(Path(directory))
    with step.whole_parameters():
        values = [p.detach().clone() for p in model.parameters()]
    return {
        "losses": [*losses, float(measured.loss)], "values": values, "held": held,
        "peak": measured.peak_bytes, "predicted": step.peak_bytes, "budget": budget,
    }


def trained_alone(norm: float | None) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer, losses = optimizer_of(model), []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model, optimizer


@pytest.mark.parametrize(
    "pieces, norm, share",
    [
        ("parameter", 0.05, None),
        pytest.param("parameter", None, 0.8, marks=pytest.mark.slow),
        pytest.param("state", None, None, marks=pytest.mark.slow),
        pytest.param("gradient", 0.05, None, marks=pytest.mark.slow),
    ],
)
def test_groups_that_share_pieces_train_as_one_process(
    pool: RankPool, pieces: str, norm: float | None, share: float | None, tmp_path: Path
) -> None:
    results = pool.run(trained, pieces, norm, share, str(tmp_path / "saved"))
    losses, alone, optimizer = trained_alone(norm)
    whole = sum(p.nbytes for p in alone.parameters())
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert result["peak"] <= result["predicted"]
        assert share is None or result["predicted"] <= result["budget"]
        for value, expected in zip(result["values"], alone.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, result["values"], results[0]["values"]))
        # A half, and what is too small to be cut: not a quarter.
        assert 0.5 * whole <= result["held"] < 0.6 * whole or pieces != "parameter"
    # A process that is alone reads values and states.
    found = network()
    state = optimizer_of(found)
    load_distributed(tmp_path / "saved", found, state)
    assert all(map(torch.equal, found.parameters(), results[0]["values"]))
    for mine, theirs in zip(found.parameters(), alone.parameters(), strict=True):
        momentum = optimizer.state[theirs]["momentum_buffer"]
        torch.testing.assert_close(state.state[mine]["momentum_buffer"], momentum)


def one_group() -> tuple[list[float], list[float]]:
    """Return the losses of one group of all ranks, and of ranks that are all in groups."""
    found = []
    for parallel, sizes in (
        (packlight.Parallel(data="replica", shard="shard"), (1, dist.get_world_size())),
        (packlight.Parallel(shard="shard"), None),
    ):
        mesh = in_groups(sizes) if sizes else init_device_mesh(
            "cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)
        )
        model, own = network(), [part(batch) for batch in batches()]
        step = packlight.fit(
            model, loss_of, optimizer_of(model), own[0], mesh=mesh, parallel=parallel
        )
        found.append([float(step(batch)) for batch in own])
    return found[0], found[1]


@pytest.mark.slow
def test_one_group_is_what_pieces_of_all_ranks_are(pool: RankPool) -> None:
    for hybrid, plain in pool.run(one_group):
        assert hybrid == plain


def test_a_modelled_mesh_of_groups_has_pieces_of_its_groups() -> None:
    peaks, seconds = [], []
    for mesh, parallel in (
        (packlight.ModelledMesh(8, 1e9), packlight.Parallel(shard="data")),
        (packlight.ModelledMesh(4, 1e9, shard=2), packlight.Parallel(data="data", shard="shard")),
        (
            packlight.ModelledMesh(4, 1e9, shard=2, shard_bytes_per_second=1e12),
            packlight.Parallel(data="data", shard="shard"),
        ),
    ):
        model = network()
        profile = packlight.profile(
            model, loss_of, optimizer_of(model), batches()[0], mesh=mesh, parallel=parallel
        )
        peaks.append(profile.memory.parameter_bytes)
        lane = mesh.lane
        assert lane.read is not None and lane.reduce_pieces is not None
        seconds.append((lane.read.seconds(2**20), lane.reduce_pieces.seconds(2**20)))
    whole = sum(p.nbytes for p in network().parameters())
    assert peaks[0] < 0.2 * whole < 0.5 * whole <= peaks[1] == peaks[2] < 0.6 * whole
    assert seconds[2][0] < seconds[1][0] and seconds[2][1] < seconds[1][1]
    with pytest.raises(OptionError, match="has a dimension shard= where"):
        packlight.profile(
            network(), loss_of, None, batches()[0], mesh=packlight.ModelledMesh(4, 1e9, shard=2)
        )
