"""Parameters on the disk between uses: the same bits below the parameters' own bytes."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError, NonFiniteLossError, OffloadError
from packlight.memory import scratch
from packlight.run.checkpoint import newest_checkpoint, save_checkpoint
from packlight.run.train_step import TrainStep
from packlight.search import prepare
from packlight.step import BufferKind, simulate
from packlight.units import parse_bytes
from tests.oracles.eager_loop import Training, assert_same_bits, twins

WIDTH, DEPTH, NUM_TOKENS = 256, 8, 64
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A temporary directory that may lie in memory; no thread is left behind."""
    monkeypatch.setattr(scratch, "file_system", lambda _: "a disk's")
    yield
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "packlight-offload"]


class Tower(nn.Module):
    """Square layers, so that parameters outweigh all else; a tied head; perhaps frozen layers."""

    def __init__(self, num_frozen: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(NUM_TOKENS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, NUM_TOKENS, bias=False)
        self.head.weight = self.embed.weight
        for layer in self.layers[:num_frozen]:
            layer.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch), batch)


def batch_of(num_rows: int = 16) -> torch.Tensor:
    return torch.arange(num_rows) % NUM_TOKENS


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def in_memory(step: TrainStep) -> list[torch.Tensor]:
    """Return the large parameters and states that are not on the disk."""
    states = [v for s in step.optimizer.state.values() for v in s.values() if v.nbytes >= 4096]
    tensors = [p for p in step.model.parameters() if p.nbytes >= 4096] + states
    return [t for t in tensors if not step.is_on_disk(t)]


def values(training: Training) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each parameter with its momentum."""
    state = training.optimizer.state
    return [(p.data, state[p]["momentum_buffer"]) for p in training.model.parameters()]


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def below_its_parameters(
    directory: Path, make_optimizer: MakeOptimizer = adamw, num_frozen: int = 0
) -> tuple[TrainStep, Training, Training]:
    """Return a step in nine tenths of its parameters' bytes, and the loop that it stands for."""
    mine, eager = twins(Tower(num_frozen), loss_fn, make_optimizer)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(), 9 * parameter_bytes(mine.model) // 10,
        moves=packlight.EXACT_MOVES, offload_directory=directory, progress=False,
    )
    assert step.ready.streaming.parameters
    return step, mine, eager


@pytest.mark.parametrize(
    ("make_optimizer", "num_frozen"), [(adamw, 0), (momentum, 3)], ids=["AdamW", "momentum, frozen"]
)
def test_steps_below_the_parameters_bytes_have_eagers_bits_and_keep_the_budget(
    make_optimizer: MakeOptimizer, num_frozen: int, tmp_path: Path
) -> None:
    """With tied weights: the embedding is fetched for both ends and written once."""
    step, mine, eager = below_its_parameters(tmp_path, make_optimizer, num_frozen)
    assert step.budget_bytes < parameter_bytes(mine.model)
    peaks = []
    for _ in range(4):
        measured = step.measured(batch_of())
        assert torch.equal(measured.loss, eager.step(batch_of()))
        assert_same_bits(mine, eager)
        assert in_memory(step) == []
        peaks.append(measured.peak_bytes)
    assert 0.98 * step.peak_bytes <= max(peaks) <= step.budget_bytes
    part = step.ready.parts[0]
    graph, written = part.step.joint.graph, part.written_buffers
    num_updated = sum(b in graph.resting for o in graph.computations for b in o.mutates)
    assert sum(b in graph.resting for b in written) == num_updated <= len(written)
    assert f"parameters streamed: {DEPTH + 1} of {2 * DEPTH + 1}" in step.describe()


def test_a_description_tells_streamed_parameters_from_state_and_adds_up(tmp_path: Path) -> None:
    step, mine, _ = below_its_parameters(tmp_path)
    graph, plan = step.profile.graph, step.plan
    kinds = {name: graph.buffers[b].kind for b in graph.resting for name in [graph.buffers[b].name]}
    weights = {name for name, p in mine.model.named_parameters() if p.nbytes >= 4096}
    assert {name for name, kind in kinds.items() if kind == "parameter"} == weights
    assert all(name.startswith("optimizer state of") for name in set(kinds) - weights)
    timeline = simulate(graph, plan.schedule, step.profile.machine)
    held = dict.fromkeys(BufferKind, 0)
    for b in timeline.peak_buffers:
        held[graph.buffers[b].kind] += graph.buffers[b].bytes
    shown = {}
    for line in step.describe().partition("whole step")[0].splitlines():
        name, size, unit = line.rsplit(maxsplit=2)
        shown[name] = parse_bytes(f"{size} {unit}")
    assert sum(shown.values()) == pytest.approx(step.peak_bytes, rel=0.03)
    for name, kind in (("streamed parameters", BufferKind.PARAMETER),
                       ("streamed optimizer state", BufferKind.STATE),
                       ("activations", BufferKind.ACTIVATION)):
        assert shown.get(name, 0) == pytest.approx(held[kind], rel=0.05, abs=64), name


def test_between_steps_everybody_sees_the_parameters_and_may_write_to_them(
    tmp_path: Path,
) -> None:
    step, mine, eager = below_its_parameters(tmp_path)
    kept = mine.model.state_dict()  # aliases, as eager's
    for index in range(4):
        assert torch.equal(step(batch_of()), eager.step(batch_of()))
        with torch.no_grad():
            assert torch.equal(step.evaluate(batch_of()), loss_fn(eager.model, batch_of()))
        for training in (mine, eager):
            with torch.no_grad():
                training.model.layers[2].weight.mul_(0.5)
                if index == 1:  # other memory altogether
                    weight = training.model.layers[3].weight
                    weight.data = weight.data + 1e-3
                if index == 2:
                    shifted = {n: v + 1e-3 for n, v in training.model.state_dict().items()}
                    training.model.load_state_dict(shifted)
                    training.optimizer.load_state_dict(
                        copy.deepcopy(training.optimizer.state_dict())
                    )
        assert_same_bits(mine, eager)
        if index == 0:
            assert all(torch.equal(kept[n], v) for n, v in eager.model.state_dict().items())


def test_a_checkpoint_of_streamed_parameters_resumes_to_the_bit(tmp_path: Path) -> None:
    step, mine, eager = below_its_parameters(tmp_path)
    step(batch_of())
    save_checkpoint(tmp_path / "saved", mine.model, mine.optimizer, step=1)
    losses = [step(batch_of()).item() for _ in range(2)]
    checkpoint = newest_checkpoint(tmp_path / "saved")
    assert checkpoint is not None
    checkpoint.restore(mine.model, mine.optimizer)
    assert [step(batch_of()).item() for _ in range(2)] == losses
    checkpoint.restore(eager.model, eager.optimizer)
    assert [eager.step(batch_of()).item() for _ in range(2)] == losses


def test_when_the_step_is_let_go_of_parameters_and_state_stay_what_they_are(
    tmp_path: Path,
) -> None:
    step, mine, eager = below_its_parameters(tmp_path)
    step(batch_of())
    eager.step(batch_of())
    del step
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert_same_bits(mine, eager)
    for _ in range(2):  # by a plain loop, in place
        assert torch.equal(mine.step(batch_of()), eager.step(batch_of()))
    assert_same_bits(mine, eager)
    again = packlight.fit(mine.model, loss_fn, mine.optimizer, batch_of(), progress=False)
    assert torch.equal(again(batch_of()), eager.step(batch_of()))
    assert_same_bits(mine, eager)


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_failing_disk_is_named_and_no_value_is_lost(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each parameter is as before or updated, and training goes on when the disk does."""
    step, mine, eager = below_its_parameters(tmp_path, momentum)
    step(batch_of())
    eager.step(batch_of())
    before = copy.deepcopy(values(eager))
    eager.step(batch_of())
    after = values(eager)
    works, num_calls = getattr(os, call), [0]

    def fails(*arguments: Any) -> int:
        num_calls[0] += 1
        if num_calls[0] > 6:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return works(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        for _ in range(2):
            with pytest.raises(OffloadError, match="Input/output error"):
                step(batch_of())
    for now, old, new in zip(values(mine), before, after, strict=True):
        assert same(now, old) or same(now, new)  # a parameter and its state together
    for training in (mine, eager):
        for parameter, (value, state) in zip(training.model.parameters(), before, strict=True):
            parameter.data = value.clone()
            training.optimizer.state[parameter]["momentum_buffer"] = state.clone()
    assert torch.equal(step(batch_of()), eager.step(batch_of()))
    assert_same_bits(mine, eager)
    assert in_memory(step) == []


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    step, mine, eager = below_its_parameters(tmp_path)
    for training in (mine, eager):
        with torch.no_grad():
            training.model.layers[-1].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError):
        step(batch_of())
    assert in_memory(step) == []
    for training in (mine, eager):
        with torch.no_grad():
            training.model.layers[-1].weight[0, 0] = 0.25
    assert torch.equal(step(batch_of()), eager.step(batch_of()))
    assert_same_bits(mine, eager)


def test_a_way_that_streams_nothing_has_all_in_memory_but_what_others_look_at(
    tmp_path: Path,
) -> None:
    """As for a smaller last batch that fits as it is."""
    step, mine, eager = below_its_parameters(tmp_path, momentum)
    assert torch.equal(step(batch_of()), eager.step(batch_of()))
    view = mine.model.layers[0].weight.detach()
    step._streamed.arrange({})
    assert [id(p) for p in mine.model.parameters() if step.is_on_disk(p)] == [
        id(mine.model.layers[0].weight)
    ]
    assert_same_bits(mine, eager)
    assert torch.equal(mine.step(batch_of()), eager.step(batch_of()))
    assert torch.equal(view, eager.model.layers[0].weight)
    assert torch.equal(step(batch_of()), eager.step(batch_of()))
    assert in_memory(step) == []
    assert_same_bits(mine, eager)


def test_freezing_parameters_later_and_other_batches_keep_all_values(tmp_path: Path) -> None:
    """The second batch is so small that its way has other schedules; then all is planned anew.

    What a layer's optimizer state was stays on the disk when the layer is frozen.
    """
    step, mine, eager = below_its_parameters(tmp_path)
    for num_rows in (16, 4, 16):
        assert torch.equal(step(batch_of(num_rows)), eager.step(batch_of(num_rows)))
    for training in (mine, eager):
        training.model.layers[0].requires_grad_(False)
    assert torch.equal(step(batch_of()), eager.step(batch_of()))
    assert in_memory(step) == []
    assert_same_bits(mine, eager)


def test_with_clipping_by_norm_only_frozen_parameters_are_streamed(tmp_path: Path) -> None:
    mine, eager = twins(Tower(DEPTH - 1), loss_fn, momentum)
    budget = 11 * parameter_bytes(mine.model) // 10
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch_of(), budget, clip_grad_norm=0.1,
        moves=packlight.EXACT_MOVES, offload_directory=tmp_path, progress=False,
    )
    assert len(step.ready.streaming.parameters) == DEPTH - 1

    def clip(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)

    for _ in range(3):
        measured = step.measured(batch_of())
        assert torch.equal(measured.loss, eager.step(batch_of(), clip))
        assert measured.peak_bytes <= budget
    assert_same_bits(mine, eager)


def test_microbatches_fetch_state_and_parameters_one_by_one_in_the_update(tmp_path: Path) -> None:
    """Accumulated gradients stay: the budget is below parameters and gradients, without state."""
    mine, eager = twins(Tower(), loss_fn, adamw)
    batch = batch_of(256)
    budget = 2 * parameter_bytes(mine.model)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batch, budget, moves=("microbatch", "offload"),
        offload_directory=tmp_path, progress=False,
    )
    assert step.way.num_microbatches > 1
    assert step.ready.streaming.states
    for _ in range(3):
        measured = step.measured(batch)
        torch.testing.assert_close(measured.loss, eager.step(batch), rtol=1e-4, atol=1e-4)
        assert measured.peak_bytes <= budget
    assert in_memory(step) == [] or not step.ready.streaming.parameters


def test_a_parameter_that_others_look_at_stays_and_the_error_says_so(tmp_path: Path) -> None:
    mine, _ = twins(Tower(), loss_fn, adamw)
    view = mine.model.layers[4].weight.detach()
    with pytest.raises(InfeasibleBudgetError, match=r"layers\.4\.weight"):
        packlight.fit(
            mine.model, loss_fn, mine.optimizer, batch_of(), 1,
            moves=packlight.EXACT_MOVES, offload_directory=tmp_path, progress=False,
        )
    assert view.data_ptr() == mine.model.layers[4].weight.data_ptr()


def test_a_disk_too_small_for_the_parameters_is_an_error_of_fit_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mine, eager = twins(Tower(), loss_fn, momentum)
    places = [p.data_ptr() for p in mine.model.parameters()]
    prepare.measure_lane(tmp_path, prepare.LANE_PROBE_BYTES)  # remembered
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadError, match="cannot reserve"):
        packlight.fit(
            mine.model, loss_fn, mine.optimizer, batch_of(),
            9 * parameter_bytes(mine.model) // 10,
            moves=packlight.EXACT_MOVES, offload_directory=tmp_path, progress=False,
        )
    assert [p.data_ptr() for p in mine.model.parameters()] == places
    assert_same_bits(mine, eager)
