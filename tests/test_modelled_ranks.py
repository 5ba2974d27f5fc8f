"""Plans for ranks that are not there: a ring's times, and the same plan as ranks that are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.cli import main
from packlight.errors import OptionError
from packlight.fitting import planned_step
from packlight.planner.plain import plain_schedule
from packlight.step import OperationKind, simulate

EXAMPLE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 8))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

def batches(split="train"):
    while True:
        yield torch.randn(16, 32), torch.randn(16, 8)
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch), batch)


def profiled(mesh: packlight.ModelledMesh) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return packlight.profile(model, loss_of, optimizer, torch.randn(8, 64), mesh=mesh)


@pytest.mark.parametrize("size", [2, 8, 512])
def test_a_reduction_takes_as_long_as_a_ring_passing_parts_around(size: int) -> None:
    mesh = packlight.ModelledMesh(size, bytes_per_second=1e9, latency_seconds=1e-5)
    num_bytes = 512 * 10**4
    # First the sums go round, part by part, then the results.
    seconds = sum(1e-5 + num_bytes / size / 1e9 for _ in range(2 * (size - 1)))
    assert mesh.lane.reduce is not None
    assert mesh.lane.reduce.seconds(num_bytes) == pytest.approx(seconds)


def test_a_faster_network_waits_less_and_holds_the_same() -> None:
    slow, fast = (
        profiled(packlight.ModelledMesh(8, bytes_per_second=speed, latency_seconds=1e-4))
        for speed in (1e6, 1e12)
    )
    found = []
    for profile in (slow, fast):
        graph = profile.graph
        reduced = [o for o in graph.operations if o.kind is OperationKind.REDUCE]
        sizes = [graph.buffers[o.creates[0]].bytes for o in reduced]
        assert sum(sizes) == sum(p.nbytes for p in network().parameters())
        found.append(simulate(graph, plain_schedule(graph), profile.machine))
    assert found[0].wait_seconds > found[1].wait_seconds
    assert found[0].seconds > found[1].seconds


def test_ranks_that_are_not_there_cannot_train() -> None:
    model = network()
    with pytest.raises(OptionError, match="cannot train"):
        packlight.fit(
            model, loss_of, torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 64),
            mesh=packlight.ModelledMesh(2, 1e9),
        )


@pytest.mark.parametrize("pieces", ["state", "parameter"])
def test_the_more_ranks_have_pieces_the_less_each_of_them_has(pieces: str) -> None:
    found = []
    for size in (2, 8):
        model = network()
        plan = planned_step(
            model, loss_of, torch.optim.Adam(model.parameters(), 0.1), torch.randn(8, 64),
            mesh=packlight.ModelledMesh(size, 1e9),
            parallel=packlight.Parallel(shard="data", pieces=pieces),
        )
        memory, profile = plan.way.memory, plan.profile
        whole = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
        small = sum(p.nbytes for p in model.parameters()) - whole
        in_pieces = whole // size
        assert memory.parameter_bytes == small + (in_pieces if pieces == "parameter" else whole)
        assert 2 * in_pieces < memory.optimizer_bytes < 2 * (in_pieces + small) + 4096
        kinds = {o.kind for o in profile.graph.operations}
        assert (OperationKind.READ in kinds) is (pieces == "parameter")
        assert (OperationKind.SHARE in kinds) is (pieces == "state")
        found.append(plan.peak_bytes)
    assert found[1] < found[0]


def test_values_lie_in_pieces_where_whole_ones_do_not_fit() -> None:
    def planned(budget: int | None) -> packlight.TrainStep:
        model = network()
        return planned_step(
            model, loss_of, torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 64), budget,
            mesh=packlight.ModelledMesh(8, 1e9), moves=("update-in-backward",),
            parallel=packlight.Parallel(shard="data", pieces="planned"),
        )

    free = planned(None)
    assert not free.ready.sharding.gathered
    budget = free.way.memory.resident_bytes - 1
    tight = planned(budget)
    assert tight.ready.sharding.gathered and tight.peak_bytes <= budget


@pytest.mark.parametrize("data, speed", [(1, 1e9), (2, 0.0)])
def test_meshes_of_nobody_are_refused(data: int, speed: float) -> None:
    with pytest.raises(OptionError, match="is none"):
        packlight.ModelledMesh(data, speed)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", "8", "--link", "1GB/s"], "is no mesh of ranks"),
        (["--mesh", "data=8", "--link", "fast"], "is no speed"),
        (["--mesh", "data=8"], "belong together"),
        (["--mesh", "data=64", "--link", "1GB/s"], "has no part for each of 64 ranks"),
    ],
)
def test_the_command_line_says_what_is_no_mesh(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    assert main(["plan", str(tmp_path / "example.py"), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_plans_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    words = ["--mesh", "data=8", "--link", "25GB/s", "--shard", "state"]
    assert main(["plan", str(tmp_path / "example.py"), *words]) == 0
    assert "parameters in pieces" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "example.py"), "--shard"]) == 2
    assert "--shard needs ranks" in capsys.readouterr().err


def test_the_command_line_shows_what_is_on_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    words = ["--mesh", "data=8", "--link", "25GB/s", "--budget", "1MiB"]
    assert main(["plan", str(tmp_path / "example.py"), *words]) == 0
    text = capsys.readouterr().out
    assert "gradients of 8 ranks reduced" in text and "On the network" in text
    assert re.search(r"network +busy for", text)


def test_a_model_without_values_has_the_plan_of_one_with_them_in_no_memory() -> None:
    def planned(device: str) -> packlight.TrainStep:
        with torch.device(device):
            model = network()
        return planned_step(
            model, loss_of, torch.optim.Adam(model.parameters(), 0.1), torch.randn(8, 64),
            mesh=packlight.ModelledMesh(8, 1e9), parallel=packlight.Parallel(shard="data"),
            moves=("update-in-backward",),
        )

    there, nowhere = planned("cpu"), planned("meta")
    assert nowhere.way.memory == there.way.memory
    assert {*nowhere.ready.in_pieces} == {p for p in nowhere.model.parameters() if p.ndim == 2}
    graphs = [step.profile.graph for step in (there, nowhere)]
    assert [o.name for o in graphs[0].operations] == [o.name for o in graphs[1].operations]
    assert [b.bytes for b in graphs[0].buffers] == [b.bytes for b in graphs[1].buffers]
    for parameter in nowhere.model.parameters():  # a storage that counts, of which nothing is there
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert not parameter.any()


def test_a_model_without_values_is_not_trained_and_has_none_at_all() -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(OptionError, match="there is nothing to train"):
        packlight.fit(
            model, loss_of, torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 64)
        )
    model[0] = nn.Linear(64, 64)
    with pytest.raises(OptionError, match="'0.weight' and 1 others have values, and 10 param"):
        packlight.profile(model, loss_of, None, torch.randn(8, 64))


def test_the_command_line_plans_groups_and_models_without_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    words = ["--mesh", "data=4,shard=2", "--link", "25GB/s,shard=100GB/s", "--no-weights"]
    assert main(["plan", str(tmp_path / "example.py"), *words, "--no-others"]) == 0
    text = capsys.readouterr().out
    assert "parameters in pieces" in text and "Other budgets" not in text
    assert "gradients of 8 ranks reduced" in text
