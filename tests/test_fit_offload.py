"""Offloaded activations and optimizer state: the same bits, the budget kept, errors by name."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import packlight
from packlight.errors import InfeasibleBudgetError, OffloadError
from packlight.memory import scratch
from packlight.memory.far import FarMemory
from packlight.run import step as run_step
from packlight.run.train_step import TrainStep
from packlight.search import prepare
from packlight.step import Lane, Speed
from tests.models import make


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Own times, and a temporary directory that may lie in memory; no thread is left behind."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scratch, "file_system", lambda _: "a disk's")
    yield
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "packlight-offload"]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def smallest_fit(
    family: str, directory: Path, moves: tuple[str, ...] = packlight.EXACT_MOVES
) -> tuple[TrainStep, Any, int]:
    """Return a step in the smallest budget that an error names, its batch, and that budget."""
    model, batch, loss_fn = make(family)
    optimizer = adamw(model)
    options: dict[str, Any] = dict(moves=moves, offload_directory=directory, progress=False)
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(model, loss_fn, optimizer, batch, 1, **options)
    smallest = caught.value.smallest_bytes
    return packlight.fit(model, loss_fn, optimizer, batch, smallest, **options), batch, smallest


def eager_steps(step: TrainStep, batch: Any, num_steps: int) -> tuple[list[float], Any, Any]:
    """Return what plain PyTorch computes from where a step stands: losses, model, optimizer."""
    model = copy.deepcopy(step.model)
    optimizer = adamw(model)
    torch.manual_seed(3)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = step.request.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, optimizer


def assert_same_state(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        for name, value in state.items():
            assert torch.equal(mine["state"][index][name], value), (index, name)


@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_offloaded_steps_have_eagers_bits_and_keep_the_smallest_budget(
    family: str, tmp_path: Path
) -> None:
    step, batch, budget = smallest_fit(family, tmp_path)
    losses, eager, optimizer = eager_steps(step, batch, 3)
    torch.manual_seed(3)
    measured = [step.measured(batch) for _ in range(3)]
    assert [m.loss.item() for m in measured] == losses
    assert max(m.peak_bytes for m in measured) <= budget
    assert max(m.peak_bytes for m in measured) >= 0.98 * step.peak_bytes
    for mine, theirs in zip(step.model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(step.optimizer.state_dict(), optimizer.state_dict())
    assert "offloaded" in step.describe()


def test_with_streamed_state_the_step_peaks_below_parameters_and_optimizer_state(
    tmp_path: Path,
) -> None:
    """A wide layer after many: 2.1 MiB of parameters, 4.2 MiB of AdamW's state."""
    layers = [torch.nn.Linear(256, 256) for _ in range(8)]
    model, batch = torch.nn.Sequential(*layers), torch.randn(16, 256)
    parameter_bytes = sum(p.nbytes for p in model.parameters())

    def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    budget = 2 * parameter_bytes  # a third less than parameters and state
    step = packlight.fit(
        model, loss_fn, adamw(model), batch, budget, moves=packlight.EXACT_MOVES,
        offload_directory=tmp_path, progress=False,
    )
    losses, eager, _ = eager_steps(step, batch, 3)
    measured = [step.measured(batch) for _ in range(3)]
    assert [m.loss.item() for m in measured] == losses
    assert max(m.peak_bytes for m in measured) <= budget
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_that_was_saved_is_whole_and_training_goes_on_from_it(tmp_path: Path) -> None:
    step, batch, _ = smallest_fit("mlp", tmp_path)
    start = copy.deepcopy(step.model.state_dict())
    torch.manual_seed(3)
    step(batch)
    saved = copy.deepcopy(step.optimizer.state_dict()), copy.deepcopy(step.model.state_dict())
    generator = torch.get_rng_state()
    losses = [step(batch).item() for _ in range(2)]
    step.model.load_state_dict(start)
    step(batch)
    step.optimizer.load_state_dict(saved[0])
    step.model.load_state_dict(saved[1])
    torch.set_rng_state(generator)
    assert [step(batch).item() for _ in range(2)] == losses


def test_two_batch_shapes_share_the_streamed_state(tmp_path: Path) -> None:
    step, batch, _ = smallest_fit("mlp", tmp_path)
    smaller = tuple(t[:100] for t in batch)
    model = copy.deepcopy(step.model)
    optimizer = adamw(model)
    for index, one in enumerate((batch, smaller, batch, smaller)):
        torch.manual_seed(index)
        mine = step(one)
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss = step.request.loss_fn(model, one)
        loss.backward()
        optimizer.step()
        assert torch.equal(mine, loss)


def test_a_disk_that_fills_up_is_named_and_leaves_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, batch, _ = smallest_fit("mlp", tmp_path)
    step(batch)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OffloadError, match="No space left"):
            step(batch)
    assert all(p.grad is None for p in step.model.parameters())


def test_a_missing_directory_is_an_error_before_anything_is_captured(tmp_path: Path) -> None:
    model, batch, loss_fn = make("mlp")
    with pytest.raises(OffloadError, match="nowhere"):
        packlight.fit(
            model, loss_fn, adamw(model), batch, "1MiB",
            offload_directory=tmp_path / "nowhere", progress=False,
        )


def test_with_a_fast_disk_recomputation_and_offload_together_beat_recomputation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By prediction, with the same times: the planner may use both."""
    speed = Speed(1e10, 1e-6)
    lane = Lane("disk", "disk", speed, speed)
    monkeypatch.setattr(prepare, "measure_lane", lambda *_: lane)
    model, batch, loss_fn = make("gpt2")
    plain = packlight.fit(model, loss_fn, adamw(model), batch, progress=False)
    memory = plain.way.memory
    budget = memory.resident_bytes + plain.plan.peak_bytes // 3
    options: dict[str, Any] = dict(progress=False, offload_directory=tmp_path)
    alone = packlight.fit(
        model, loss_fn, adamw(model), batch, budget, moves=("update-in-backward",), **options
    )
    both = packlight.fit(
        model, loss_fn, adamw(model), batch, budget, moves=packlight.EXACT_MOVES, **options
    )
    assert both.way.seconds < alone.way.seconds
    assert both.plan.offloaded_bytes > 0


def test_where_buffers_go_to_the_hosts_memory_a_step_has_eagers_bits_and_streams_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU they do; on a CPU the same tier is asked for here."""
    for module in (prepare, run_step):
        monkeypatch.setattr(module, "far_memory", lambda *_: FarMemory())
    speed = Speed(1e10, 1e-6)
    lane = Lane("host memory", "host memory", speed, speed)
    monkeypatch.setattr(prepare, "measure_lane", lambda *_: lane)
    model, batch, loss_fn = make("mlp")
    options: dict[str, Any] = dict(moves=packlight.EXACT_MOVES, progress=False)
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(model, loss_fn, adamw(model), batch, 1, **options)
    budget = caught.value.smallest_bytes
    step = packlight.fit(model, loss_fn, adamw(model), batch, budget, **options)
    assert step.plan.offloaded_bytes > 0 and not step.ready.streaming
    losses, eager, _ = eager_steps(step, batch, 2)
    torch.manual_seed(3)
    assert [step(batch).item() for _ in range(2)] == losses
    for mine, theirs in zip(step.model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, theirs)
