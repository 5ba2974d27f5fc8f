"""Programs of several sections: what crosses cuts, and frames in flight at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import read_joint_graph
from packlight.capture.step_capture import StepCapture
from packlight.capture.whole_step import Consumer, Consumption, whole_step
from packlight.costs.profiler import CallProfiler
from packlight.lower.emit import emit
from packlight.lower.frame import Frame
from packlight.lower.program import Program
from packlight.memory.host import HostTier
from packlight.planner import plan_schedule, smallest_plan
from packlight.step import Schedule, with_transfers
from packlight.step.simulate import live_after_forward
from tests.oracles.machines import one_lane

ONE = torch.ones(())


class Block(nn.Module):
    """Linear, dropout, GELU; every block reads the same constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(F.gelu(self.linear(x)), 0.3) * torch.tensor(0.7)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, list[torch.Tensor], JointStep, list[Any], Schedule]:
    """Return a model, two batches, its joint step, the step's inputs, and a schedule.

    Six blocks are recomputed and their dropout masks replayed: the schedule has the smallest peak.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(6)))
    batches = [torch.randn(64, 32) for _ in range(2)]
    capture = StepCapture(loss_fn, model)
    loss = capture.capture(batches[0])
    with CallProfiler(progress=False) as profiler:
        step = read_joint_graph(loss.joint, loss.num_forward_outputs, profiler.measure)
    schedule = smallest_plan(step.graph).schedule
    counts = schedule.run_counts()
    assert any(o.is_random and counts[o.id] > 1 for o in step.graph.operations)
    return model, batches, step, loss.arguments, schedule


def primals_for(arguments: list[Any], old: torch.Tensor, new: torch.Tensor) -> list[Any]:
    return [new if a is old else a for a in arguments]


def gradients_of(step: JointStep, model: nn.Module, arguments: list[Any], results: Any) -> Any:
    """Return the gradients among backward results, in the order of the model's parameters."""
    places = {id(a): i for i, a in enumerate(arguments)}
    return [results[places[id(p)]] for p in model.parameters()]


def assert_same(mine: Any, theirs: Any) -> None:
    assert len(mine) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


ORDERS = ["F0 F1 B0 B1", "F0 F1 B1 B0", "F0 B0 F1 B1"]


def run_frames(captured: Any, frames: list[Frame], order: str) -> tuple[list[Any], list[Any]]:
    """Return each frame's loss and gradients when their sections run in an order."""
    model, batches, step, arguments, _ = captured
    losses: list[Any] = [None, None]
    gradients: list[Any] = [None, None]
    torch.manual_seed(7)
    with torch.no_grad():
        for what, k in ((name[0], int(name[1])) for name in order.split()):
            if what == "F":
                (losses[k],) = frames[k].run(primals_for(arguments, batches[0], batches[k]))
            else:
                results = frames[k].run([ONE])
                gradients[k] = gradients_of(step, model, arguments, results)
                assert not frames[k].values, "nothing is left in a frame that has run"
    return losses, gradients


def assert_eagers(captured: Any, order: str, losses: list[Any], gradients: list[Any]) -> None:
    """Dropout masks are drawn in the forwards' order, as eager PyTorch draws them."""
    model, batches, *_ = captured
    torch.manual_seed(7)
    eager = {int(name[1]): loss_fn(model, batches[int(name[1])])
             for name in order.split() if name[0] == "F"}
    for k, loss in eager.items():
        assert torch.equal(losses[k], loss)
        assert_same(gradients[k], torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("order", ORDERS)
def test_frames_of_one_program_do_not_disturb_each_other(captured: Any, order: str) -> None:
    _, batches, step, _, schedule = captured
    program = emit(step, schedule, (schedule.num_forward,))
    frames = [Frame(program, {}) for _ in batches]
    assert_eagers(captured, order, *run_frames(captured, frames, order))


@pytest.mark.parametrize("order", ORDERS)
def test_frames_with_transfers_have_tiers_of_their_own(captured: Any, order: str) -> None:
    _, batches, step, _, _ = captured
    machine = one_lane(1e9, 1e-5)
    budget_bytes = int(0.85 * smallest_plan(step.graph).peak_bytes)
    step = replace(step, graph=with_transfers(step.graph, machine))
    schedule = plan_schedule(step.graph, budget_bytes, machine).schedule
    program = emit(step, schedule, (schedule.num_forward,))
    assert program.slots and program.helpers == ("tier",)
    frames = [Frame(program, {"tier": HostTier(program.slots, verify=True)}) for _ in batches]
    assert_eagers(captured, order, *run_frames(captured, frames, order))


class Accumulated:
    """Adds up what frames hand out, as a pipeline's stage would."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[int, torch.Tensor] = {}

    def result(self, index: int, value: torch.Tensor) -> None:
        self.losses.append(value.clone())

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        if primal in self.gradients:
            self.gradients[primal].add_(gradient)
        else:
            self.gradients[primal] = gradient.clone()


def test_frames_of_a_whole_step_accumulate_gradients_as_eager_does(captured: Any) -> None:
    model, batches, joint, arguments, _ = captured
    places = {id(a): i for i, a in enumerate(arguments)}
    consumers = {places[id(p)]: Consumer(name) for name, p in model.named_parameters()}
    step = whole_step(joint, consumers, Consumption.ACCUMULATE)
    schedule = smallest_plan(step.joint.graph).schedule
    program = emit(step, schedule, (schedule.num_forward,))
    events = Accumulated()
    frames = [Frame(program, {"events": events}) for _ in batches]
    torch.manual_seed(7)
    with torch.no_grad():
        for frame, batch in zip(frames, batches, strict=True):
            assert frame.run(primals_for(arguments, batches[0], batch)) == ()
        results = [frame.run([ONE]) for frame in reversed(frames)]
    torch.manual_seed(7)
    model.zero_grad()
    losses = [loss_fn(model, batch) for batch in batches]
    for loss in reversed(losses):
        loss.backward()
    assert [r.item() for (r,) in results] == [loss.item() for loss in reversed(losses)]
    assert_same([events.gradients[places[id(p)]] for p in model.parameters()],
                [p.grad for p in model.parameters()])
    assert_same(events.losses, losses)
    model.zero_grad()


def test_programs_with_transfers_may_be_cut_where_transfers_are_under_way(captured: Any) -> None:
    model, batches, step, arguments, _ = captured
    machine = one_lane(1e9, 1e-5)
    budget_bytes = int(0.85 * smallest_plan(step.graph).peak_bytes)
    step = replace(step, graph=with_transfers(step.graph, machine))
    schedule = plan_schedule(step.graph, budget_bytes, machine).schedule
    program = emit(step, schedule, range(1, len(schedule.instructions)))
    torch.manual_seed(7)
    with HostTier(program.slots, verify=True) as tier:
        results = run(program, arguments, {"tier": tier})
    torch.manual_seed(7)
    loss = loss_fn(model, batches[0])
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(results[0], loss)
    assert_same(gradients_of(step, model, arguments, results[1:]), theirs)


@pytest.mark.parametrize("num_instructions", [1, 7, 40])
def test_a_program_cut_anywhere_computes_the_same(captured: Any, num_instructions: int) -> None:
    """A section may be a single instruction."""
    model, batches, step, arguments, schedule = captured
    end = len(schedule.instructions)
    cuts = sorted({schedule.num_forward, *range(num_instructions, end, num_instructions)})
    program = emit(step, schedule, cuts)
    assert len(program.sections) == len(cuts) + 1
    torch.manual_seed(7)
    results = run(program, arguments)
    torch.manual_seed(7)
    loss = loss_fn(model, batches[0])
    assert torch.equal(results[0], loss)
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    assert_same(gradients_of(step, model, arguments, results[1:]), theirs)


def run(program: Program, primals: list[Any], helpers: Any = None) -> list[Any]:
    """Run all sections of one frame and return all results."""
    frame, results = Frame(program, helpers or {}), []
    with torch.no_grad():
        for index, section in enumerate(program.sections):
            given = primals if index == 0 else []
            results += frame.run([*given, *([ONE] if section.takes_tangents else [])])
    return results


def test_what_crosses_a_cut_is_in_memory_there_by_the_memory_model(captured: Any) -> None:
    _, _, step, _, schedule = captured
    residents = {b.id for b in step.graph.buffers if b.kind.is_resident}
    for cut in range(1, len(schedule.instructions), 13):
        sections = emit(step, schedule, (cut,)).sections
        crossing = set(sections[1].takes) - residents
        assert crossing <= live_after_forward(step.graph, replace(schedule, num_forward=cut))
        assert sections[0].leaves == sections[1].takes


def test_constants_and_unused_primals_do_not_cross(captured: Any) -> None:
    _, _, step, _, schedule = captured
    _, backward = emit(step, schedule, (schedule.num_forward,)).sections
    taken = {step.root_of_buffer[b] for b in backward.takes}
    assert not [node for node in taken if node.op == "get_attr"]
    biases = [n for n in step.primals if n.meta["val"].shape == (32,)]
    assert biases and taken & set(step.primals), "weights are read in the backward"
