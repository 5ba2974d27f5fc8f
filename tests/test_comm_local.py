"""Local steps on two and three gloo ranks, beside all of them in one process in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import packlight
from packlight.cli import main
from packlight.comm import (
    LocalSteps,
    Schedule,
    diloco,
    fed_avg,
    post_local_sgd,
    streaming_diloco,
)
from packlight.errors import OptionError
from tests.rank_pool import RankPool
from tests.test_comm_ranks import Net, batch_of, size_of


@pytest.fixture(scope="module", params=[2, 3])
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankPool]:
    """Ranks for all tests."""
    pool = RankPool(request.param, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def local_on_rank(make: Any, options: dict[str, Any], num_steps: int, stop: int) -> Any:
    """Train with steps of its own, in pieces that resume at `stop`; return all parameters' ends."""
    rank = dist.get_rank()
    options = {name: value[rank] if name == "num_samples" else value
               for name, value in options.items()}
    ends = []
    for stopped_at in (None, stop):
        model = Net()
        if rank:  # rank 0's are everybody's
            nn.init.zeros_(model.layers[0].weight)
        local: LocalSteps = make(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        taking_part = []
        for step in range(num_steps):
            if step == stopped_at:
                saved = copy.deepcopy((model.state_dict(), local.state_dict()))
                model = Net()
                local = make(model, **options)
                model.load_state_dict(saved[0])
                local.load_state_dict(saved[1])
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            model(batch_of(step, rank)).backward()
            optimizer.step()
            taking_part.append(local.taking_part())
            local.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), "resumes to the last bit"
    return ends[0], taking_part


def local_here(
    num_ranks: int, num_steps: int, schedule: Schedule, weights: list[float],
    taking_part: list[list[int]],
) -> list[torch.Tensor]:
    """The oracle: all ranks in one process, in float64, averages by hand."""
    models = [Net().double() for _ in range(num_ranks)]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    buffers = [torch.zeros_like(a) for a in anchor]
    pending: list[tuple[int, list[int], list[torch.Tensor]]] = []
    parts = _parts(models[0], schedule.fragments)
    for step in range(1, num_steps + 1):
        for rank, model in enumerate(models):
            model.zero_grad()
            model(batch_of(step - 1, rank).double()).backward()
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)  # type: ignore[operator]
        for fragment, part in enumerate(parts):
            if schedule.due(fragment, step):
                those = taking_part[step - 1]
                total = sum(weights[r] for r in those)
                changes = [
                    sum(weights[r] / total * (anchor[i] - list(models[r].parameters())[i].detach())
                        for r in those)
                    for i in part
                ]
                pending.append((step + schedule.overlap, part, changes))  # type: ignore[arg-type]
        for item in [p for p in pending if p[0] <= step]:
            pending.remove(item)
            for i, change in zip(item[1], item[2], strict=True):
                buffers[i] = schedule.momentum * buffers[i] + change
                look = change + schedule.momentum * buffers[i]
                anchor[i] = anchor[i] - schedule.lr * (look if schedule.nesterov else buffers[i])
                for model in models:
                    p = list(model.parameters())[i]
                    p.data.copy_(schedule.mixing * p.detach() + (1 - schedule.mixing) * anchor[i])
    return [p.detach() for p in models[0].parameters()]


def _parts(model: nn.Module, count: int) -> list[list[int]]:
    sizes = [p.numel() for p in model.parameters()]
    middles = [sum(sizes[:i]) + sizes[i] / 2 for i in range(len(sizes))]
    return [
        [i for i, m in enumerate(middles) if int(m * count / sum(sizes)) == part]
        for part in range(count)
    ]


CASES: dict[str, tuple[Any, dict[str, Any], Schedule]] = {
    "post-local SGD": (post_local_sgd, {"every": 3, "start": 2}, Schedule(3, 2)),
    "every step": (post_local_sgd, {"every": 1}, Schedule(1)),
    "FedAvg": (fed_avg, {"every": 2, "num_samples": [1.0, 3.0, 4.0]}, Schedule(2)),
    "FedAvg, half of them": (
        fed_avg, {"every": 2, "num_samples": [1.0, 3.0, 4.0], "fraction": 0.5},
        Schedule(2, fraction=0.5),
    ),
    "DiLoCo": (diloco, {"every": 3}, Schedule(3, lr=0.7, momentum=0.9, nesterov=True)),
    "streaming DiLoCo": (
        streaming_diloco, {"every": 4, "fragments": 2, "overlap": 1, "momentum": 0.5},
        Schedule(4, lr=0.7, momentum=0.5, nesterov=True, fragments=2, overlap=1, mixing=0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_local_steps_are_those_of_one_process(pool: RankPool, name: str) -> None:
    make, options, schedule = CASES[name]
    results = pool.run(local_on_rank, make, options, 8, 5)
    weights = options.get("num_samples", [1.0] * 3)
    expected = local_here(size_of(pool), 8, schedule, weights, results[0][1])
    for value, right in zip(results[0][0], expected, strict=True):
        torch.testing.assert_close(value.double(), right, atol=1e-6, rtol=1e-5)
    if name == "FedAvg, half of them":
        drawn = {tuple(those) for those in results[0][1]}
        assert {len(those) for those in drawn} == {round(0.5 * size_of(pool))} and len(drawn) > 1


def test_sparse_outer_gradients_resume_and_leave_all_ranks_the_same(pool: RankPool) -> None:
    options = {"every": 2, "compressor": "topk:0.05+q2", "together": True}
    results = pool.run(local_on_rank, diloco, options, 6, 3)
    for value, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"every": 0}, "every=0"), ({"lr": 0}, "lr=0"), ({"momentum": 1.0}, "momentum=1.0"),
        ({"fraction": 0}, "fraction=0"), ({"every": 2, "fragments": 3}, "no more than one a step"),
        ({"every": 3, "overlap": 3}, "overlap below every=3"),
        ({"start": 5, "fragments": 2}, "nothing to overlap"),
    ],
)  # fmt: skip
def test_schedules_that_make_no_sense_are_refused(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Schedule(**numbers)


# -- beside planned steps, and on the command line


def fitted_on_rank() -> list[list[torch.Tensor]]:
    """Train by hand and by planned steps, both with averages of three steps' changes."""
    ends = []
    for is_planned in (False, True):
        model = Net()
        local = diloco(model, every=3, compressor="topk:0.1+q2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        batches = [batch_of(step, dist.get_rank()) for step in range(7)]
        if is_planned:
            step = packlight.fit(model, lambda m, b: m(b), optimizer, batches[0])
        for batch in batches:
            if is_planned:
                step(batch)
            else:
                optimizer.zero_grad()
                model(batch).backward()
                optimizer.step()
            local.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    return ends


def test_planned_steps_take_averages_of_their_changes() -> None:
    with TemporaryDirectory() as folder:
        pool = RankPool(2, Path(folder))
        for by_hand, planned in pool.run(fitted_on_rank):
            assert all(torch.equal(a, b) for a, b in zip(by_hand, planned, strict=True))
        pool.close()


FILE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

def loss(model, batch):
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)

def batches(split="train"):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(16, 8, generator=generator)
"""


@pytest.mark.slow
def test_one_command_starts_workers_that_send_little(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(FILE)
    command = [
        sys.executable, "-m", "packlight", "train", str(file), "--workers", "2", "--steps", "8",
        "--comm", "topk:0.1+q2", "--local-steps", "4",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: 8 steps" in done.stdout and "bytes a step" in done.stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--local-steps", "3"], "--comm fp32"),
        (["--comm", "q4"], "--workers 2, or torchrun"),
        (["--comm", "q5", "--workers", "2"], "unknown compressor 'q5'"),
        (["--comm", "q4", "--workers", "1"], "2 or more"),
        (["--comm", "q4", "--workers", "2", "--checkpoint", "c"], "state_dict()"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    words: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(FILE)
    assert main(["train", str(file), *words]) == 2
    assert hint in capsys.readouterr().err
