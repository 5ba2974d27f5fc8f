"""The torch.compile backend with a disk: eager's bits below what recomputation alone can reach."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packlight import backend as backend_module
from packlight.backend import Compilation, PacklightBackend, backend_from_options
from packlight.capture.dynamo import plain_errors
from packlight.costs.lane import measure_lane
from packlight.costs.peak import measure_peak
from packlight.errors import InfeasibleBudgetError, OffloadError
from packlight.memory import far, scratch
from packlight.memory.host import HostTier
from packlight.memory.tier import SlotSpec
from packlight.planner import smallest_plan
from packlight.step import (
    Action,
    Instruction,
    OperationKind,
    Plan,
    Schedule,
    StepGraph,
)
from tests.models import make
from tests.oracles.machines import lane, read, write


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Own times, a fast link, a directory that may lie in memory; no thread is left behind."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scratch, "file_system", lambda _: "a disk's")
    monkeypatch.setattr(backend_module, "measure_lane", lambda *_: lane("disk", 1e9, 1e-5))
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "packlight-offload"]


class Net(nn.Module):
    """Batch norm, dropout, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(64) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.dropout(F.gelu(norm(layer(x))), 0.2, self.training)
        return x.square().mean()


Twins = tuple[Any, Any, torch.Tensor, Callable[..., Any], PacklightBackend]


def twins_on(
    directory: Path, kind: type[nn.Module] = Net, share: float = 0.9, rehearse: bool = True
) -> Twins:
    """Return an eager net, its copy, a batch, the copy compiled with a disk, and its backend.

    The budget is a share of the smallest that recomputation can reach.
    """
    torch.manual_seed(0)
    eager = kind()
    mine = copy.deepcopy(eager)
    torch._dynamo.reset()
    backend = PacklightBackend(
        progress=False, offload_directory=directory,
        rehearse=rehearse, choose_budget=lambda graph: int(share * smallest_plan(graph).peak_bytes),
    )
    call = torch.compile(mine, backend=backend, fullgraph=True)
    return eager, mine, torch.randn(512, 64), call, backend


def compilation(backend: PacklightBackend) -> Compilation:
    """Return the one graph that was compiled; it transfers from the forward to the backward."""
    (found,) = backend.compilations
    schedule, operations = found.plan.schedule, found.graph.operations
    runs = [
        [operations[i.target] for i in part if i.action is Action.RUN]
        for part in (
            schedule.instructions[: schedule.num_forward],
            schedule.instructions[schedule.num_forward :],
        )
    ]
    early = {o.moved for o in runs[0] if o.kind is OperationKind.WRITE}
    assert early.intersection(o.moved for o in runs[1] if o.kind is OperationKind.READ)
    return found


def num_tiers(backend: PacklightBackend) -> int:
    tiers = compilation(backend).tiers
    assert tiers is not None
    return tiers.num_tiers


def assert_equal_models(mine: nn.Module, eager: nn.Module) -> None:
    for a, b in zip(mine.parameters(), eager.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad) and torch.equal(a, b)
    for a, b in zip(mine.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_gpt_trains_with_eagers_bits_below_the_smallest_budget_of_recomputation(
    tmp_path: Path,
) -> None:
    eager, batch, loss_fn = make("gpt2", layers=3)
    mine = copy.deepcopy(eager)
    steps = []
    smallest: list[int] = []

    def below(graph: Any) -> int:
        smallest.append(smallest_plan(graph).peak_bytes)
        return int(0.85 * smallest[-1])

    torch._dynamo.reset()
    backend = PacklightBackend(
        progress=False, offload_directory=tmp_path, choose_budget=below
    )
    for model in (eager, mine):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        function = loss_fn
        if model is mine:
            function = torch.compile(loss_fn, backend=backend, fullgraph=True)
        torch.manual_seed(5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = function(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        steps.append(losses)
    assert steps[0] == steps[1]
    assert_equal_models(mine, eager)

    def step() -> None:
        optimizer.zero_grad()
        function(mine, batch).backward()

    optimizer.zero_grad()
    peak_bytes = measure_peak(step).peak_bytes
    assert peak_bytes <= int(0.85 * smallest[0]) < smallest[0]
    assert peak_bytes >= 0.95 * compilation(backend).plan.peak_bytes
    torch._dynamo.reset()
    with pytest.raises(InfeasibleBudgetError), plain_errors():
        alone = PacklightBackend(progress=False, budget_bytes=int(0.85 * smallest[0]))
        torch.compile(loss_fn, backend=alone, fullgraph=True)(mine, batch)


def test_several_forwards_before_their_backwards_have_slots_of_their_own(tmp_path: Path) -> None:
    eager, mine, batch, call, backend = twins_on(tmp_path)
    for net, forward in ((eager, eager), (mine, call)):
        torch.manual_seed(5)
        losses = [forward(batch * scale) for scale in (1.0, 2.0, 3.0)]
        for index in (1, 0, 2):
            losses[index].backward()
        del net
    assert_equal_models(mine, eager)
    assert num_tiers(backend) == 3
    del losses
    call(batch).backward()
    assert num_tiers(backend) == 3, "tiers serve again"


def test_a_retained_graph_fetches_again(tmp_path: Path) -> None:
    eager, mine, batch, call, backend = twins_on(tmp_path)
    for forward in (eager, call):
        torch.manual_seed(5)
        loss = forward(batch)
        loss.backward(retain_graph=True)
        forward(batch.flip(0)).backward()  # another run in between
        loss.backward()
    assert_equal_models(mine, eager)
    assert num_tiers(backend) == 2


def test_a_graph_whose_backward_never_runs_gives_its_slots_back(tmp_path: Path) -> None:
    eager, mine, batch, call, backend = twins_on(tmp_path)
    for forward in (eager, call):
        torch.manual_seed(5)
        for _ in range(5):
            forward(batch)
        forward(batch).backward()
    assert_equal_models(mine, eager)
    assert num_tiers(backend) == 1


def test_accumulation_evaluation_and_other_batch_shapes(tmp_path: Path) -> None:
    eager, mine, batch, call, backend = twins_on(tmp_path)
    found = []
    for net, forward in ((eager, eager), (mine, call)):
        torch.manual_seed(5)
        for _ in range(2):
            forward(batch).backward()
        net.eval()
        with torch.no_grad():
            found.append(forward(batch))
        net.train()
        forward(batch[:300]).backward()
        forward(batch).backward()
    assert torch.equal(*found)
    assert_equal_models(mine, eager)
    assert len(backend.compilations) == 2


class Shifted(nn.Module):
    """Reads a buffer and then changes it: what runs again in the backward needs the old value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(512, 64))
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = F.gelu(layer(x) + self.shift if index < 4 else layer(x))
        self.shift.add_(1.0)
        return x.square().mean()


def with_snapshot_transferred(graph: StepGraph, plan: Plan) -> Plan:
    """Return a plan whose snapshot goes away in the forward and comes back for the backward."""
    (snapshot,) = (o for o in graph.operations if o.kind is OperationKind.SNAPSHOT)
    (copy,) = snapshot.creates
    schedule = plan.schedule
    early, late = (
        [i for i in part if not (i.action is Action.FREE and i.target == copy)]
        for part in (
            schedule.instructions[: schedule.num_forward],
            schedule.instructions[schedule.num_forward :],
        )
    )
    assert any(
        i.action is Action.RUN and copy in graph.operations[i.target].reads for i in late
    ), "something that reads it runs again"
    forward = (*early, write(graph, copy), Instruction(Action.FREE, copy))
    backward = (read(graph, copy), *late, Instruction(Action.FREE, copy))
    return replace(plan, schedule=Schedule((*forward, *backward), len(forward)), lane_seconds=1.0)


def test_the_old_value_of_a_buffer_that_changes_is_offloaded_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_schedule = backend_module.plan_schedule

    def transferred(graph: StepGraph, budget: int | None, machine: Any) -> Plan:
        plan = plan_schedule(graph.without_transfers(), budget)
        return with_snapshot_transferred(graph, plan)

    monkeypatch.setattr(backend_module, "plan_schedule", transferred)
    eager, mine, batch, call, backend = twins_on(tmp_path, Shifted, share=1.0, rehearse=False)
    for forward in (eager, call):
        for _ in range(3):
            forward(batch).backward()
    assert_equal_models(mine, eager)
    compilation(backend)


def test_a_disk_that_fills_up_is_named_and_the_next_step_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, mine, batch, call, _ = twins_on(tmp_path)
    states = copy.deepcopy(mine.state_dict())
    call(batch).backward()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OffloadError, match="No space left"):
            call(batch).backward()
    mine.zero_grad()
    mine.load_state_dict(states)
    for forward in (eager, call):
        torch.manual_seed(5)
        forward(batch).backward()
    assert_equal_models(mine, eager)


def test_hooks_that_copy_what_is_saved_are_an_error_and_never_wrong_values(tmp_path: Path) -> None:
    _, _, batch, call, _ = twins_on(tmp_path)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = call(batch)
    with pytest.raises(OffloadError, match="saved-tensor hooks"):
        loss.backward()


def test_a_missing_directory_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "measure_lane", measure_lane)
    backend = backend_from_options(
        {"budget": "1MiB", "offload_directory": tmp_path / "nowhere", "progress": False}
    )
    model = nn.Linear(4, 4)
    with pytest.raises(OffloadError, match="nowhere"), plain_errors():
        torch.compile(model, backend=backend)(torch.ones(2, 4)).sum().backward()


def test_buffers_of_a_gpu_go_to_the_hosts_memory() -> None:
    """What it does there needs a GPU; a HostTier on the CPU takes the same calls."""
    memory = far.far_memory(torch.device("cuda", 0), None)
    assert memory == far.FarMemory(None) and far.far_memory(torch.device("cpu"), None) is None
    value = torch.arange(6.0)
    with memory.make_tier([SlotSpec.of(value)]) as tier:
        assert isinstance(tier, HostTier)
    with pytest.raises(OffloadError, match="cuda:0.*\n.*leave offload_directory out"):
        far.far_memory(torch.device("cuda", 0), "anywhere")


def test_the_backend_trains_with_buffers_in_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "far_memory", lambda *_: far.FarMemory())
    eager, mine, batch, call, backend = twins_on(tmp_path)
    for forward in (eager, call):
        torch.manual_seed(5)
        for _ in range(2):
            forward(batch).backward()
    assert_equal_models(mine, eager)
    assert num_tiers(backend) == 1
