"""Reductions as operations: timelines counted by hand, gradients in buckets, and their order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from packlight.capture.read_joint import read_joint_graph
from packlight.capture.reduced import Reductions, with_reductions
from packlight.capture.step_capture import StepCapture
from packlight.capture.whole_step import Consumer, Consumption, WholeStep, whole_step
from packlight.costs.profiler import CallProfiler
from packlight.errors import ScheduleError
from packlight.lower.emit import emit
from packlight.lower.frame import Frame
from packlight.planner import plan_schedule, smallest_plan
from packlight.planner.plain import plain_schedule
from packlight.step import (
    Action,
    Buffer,
    BufferKind,
    Instruction,
    Lane,
    Machine,
    Operation,
    OperationKind,
    Phase,
    Schedule,
    Speed,
    StepGraph,
    simulate,
)

# Half a second until the first byte, then two bytes per second.
NETWORK = Lane("network", "", None, None, compute_share=0.25, reduce=Speed(2.0, 0.5))
MACHINE = Machine().with_lane(NETWORK)


# -- by hand


def two_gradients(lane: str = "network", can_recompute: bool = False) -> StepGraph:
    """Return a step with two gradients of 8 bytes, reduced in 4 s each, and their updates.

    0 forward   1 first gradient   2 its reduction   3 second gradient   4 its reduction
    5, 6 updates
    """
    weights = [Buffer(i, 8, BufferKind.PARAMETER, f"weight {i}") for i in range(2)]
    kinds = [BufferKind.ACTIVATION, *[BufferKind.GRADIENT] * 6]
    sizes = [4, 8, 8, 0, 8, 8, 0]
    made = [Buffer(2 + i, s, k) for i, (s, k) in enumerate(zip(sizes, kinds, strict=True))]
    a, g0, r0, t0, g1, r1, t1 = range(2, 9)
    once = {"can_recompute": False}

    def reduction(index: int, reads: tuple[int, ...], creates: tuple[int, int]) -> Operation:
        return Operation(
            index, "reduce", reads, creates, 4.0, phase=Phase.UPDATE, lane=lane,
            kind=OperationKind.REDUCE, overwrites=((creates[0], reads[0]),),
            can_recompute=can_recompute,
        )

    operations = (
        Operation(0, "forward", (0, 1), (a,), 1.0),
        Operation(1, "backward", (a,), (g0,), 1.0, phase=Phase.BACKWARD),
        reduction(2, (g0,), (r0, t0)),
        Operation(3, "backward", (a,), (g1,), 3.0, phase=Phase.BACKWARD),
        reduction(4, (g1, t0), (r1, t1)),
        Operation(5, "update", (r0, 0), (), 1.0, phase=Phase.UPDATE, mutates=(0,), **once),
        Operation(6, "update", (r1, 1), (), 1.0, phase=Phase.UPDATE, mutates=(1,), **once),
    )
    return StepGraph(operations, (*weights, *made), 1, (), ())


def test_reductions_run_one_after_the_other_beside_the_backward() -> None:
    graph = two_gradients()
    timeline = simulate(graph, plain_schedule(graph), MACHINE)
    first, second = timeline.lanes[0].runs
    # 1 s forward and 1 s backward come first; each reduction takes a second from computation.
    assert (first.start_seconds, first.end_seconds) == (2.0, 6.0)
    assert (second.start_seconds, second.end_seconds) == (6.0, 10.0)
    # Forward 1, backward 1, share 1, backward 3, share 1; update at 7; the other waits until 10.
    assert timeline.done_seconds[-1] == timeline.seconds == 11.0
    assert timeline.wait_seconds == 2.0
    assert graph.seconds == 7.0
    assert timeline.peak_bytes == 4 + 8 + 8  # the activation, and two gradients under way


def test_a_reduction_that_may_not_work_in_place_holds_both() -> None:
    graph = two_gradients()
    run, free = Action.RUN, Action.FREE
    order = [
        (run, 0), (run, 1), (run, 2), (free, 3), (run, 3), (run, 4), (free, 6), (free, 2),
        (free, 5), (run, 5), (free, 4), (run, 6), (free, 7), (free, 8),
    ]
    schedule = Schedule(tuple(Instruction(*pair) for pair in order), 1)
    timeline = simulate(graph, schedule, MACHINE)
    assert timeline.live_bytes[2] == 4 + 8 + 8
    # What it reads stays until it is over: freeing that waits until 6.
    assert timeline.done_seconds[3] == 6.0


def test_reductions_run_once_and_need_their_lane() -> None:
    graph = two_gradients()
    schedule = plain_schedule(graph)
    with pytest.raises(ScheduleError, match="without a machine with a lane 'network'"):
        simulate(graph, schedule)
    twice = replace(schedule, instructions=(*schedule.instructions, Instruction(Action.RUN, 2)))
    with pytest.raises(ScheduleError):
        simulate(graph, twice, MACHINE)
    with pytest.raises(ValueError, match="reductions have a lane"):
        two_gradients(lane="")
    with pytest.raises(ValueError, match="could run again"):
        two_gradients(can_recompute=True)


def test_plans_are_judged_beside_their_reductions() -> None:
    graph = two_gradients()
    plan = plan_schedule(graph, None, MACHINE)
    timeline = simulate(graph, plan.schedule, MACHINE)
    assert (plan.seconds, plan.peak_bytes) == (timeline.seconds, timeline.peak_bytes) == (11.0, 20)
    assert plan.wait_seconds == 2.0 and plan.lane_seconds == 8.0 and plan.slowdown == 1.0
    in_line = graph.with_reductions_in_line(MACHINE)
    assert simulate(in_line, plan.schedule).peak_bytes == plan.peak_bytes
    assert plan.bound_seconds <= in_line.seconds + 1e-9 == 9.0 + 1e-9


# -- of captured steps


class Layers(nn.Module):
    """Gradients that are transposed, of one element, expanded, and one shared by two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(8))
        self.twin = nn.Parameter(torch.zeros(8))
        self.channels_last = nn.Parameter(torch.randn(2, 3, 2, 2).to(
            memory_format=torch.channels_last))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + (self.shift + self.twin)
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2) * self.scale
        return x.square().mean() + self.channels_last.square().sum()


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


class Doubling:
    """Stands in for another rank that has the same gradients; says what happens when."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.waited: list[int] = []
        self._sums: dict[int, torch.Tensor] = {}

    def start(self, bucket: int, value: torch.Tensor) -> None:
        assert value.untyped_storage().nbytes() == value.numel() * value.itemsize
        self.started.append(bucket)
        self._sums[bucket] = value

    def wait(self, bucket: int) -> None:
        self.waited.append(bucket)
        self._sums.pop(bucket).mul_(2.0)


class Collected:
    """Takes gradients."""

    def __init__(self) -> None:
        self.gradients: dict[int, torch.Tensor] = {}

    def result(self, index: int, value: torch.Tensor) -> None:
        """The loss is of no interest."""

    def reduced_gradient(self, primal: int, gradient: torch.Tensor) -> None:
        self.gradients[primal] = gradient.clone()
        gradient.fill_(float("nan"))  # it is ours: nobody else may look at it


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, torch.Tensor, WholeStep, list[Any], dict[int, nn.Parameter]]:
    torch.manual_seed(0)
    model = Layers()
    batch = torch.randint(12, (3, 5))
    capture = StepCapture(loss_of, model)
    loss = capture.capture(batch)
    with CallProfiler(progress=False) as profiler:
        joint = read_joint_graph(loss.joint, loss.num_forward_outputs, profiler.measure)
    name_of = {id(p): name for name, p in model.named_parameters()}
    parameter_of = {i: a for i, a in enumerate(loss.arguments) if id(a) in name_of}
    consumers = {i: Consumer(name_of[id(p)], 1e-6) for i, p in parameter_of.items()}
    step = whole_step(joint, consumers, Consumption.UPDATE)
    return model, batch, step, loss.arguments, parameter_of


@pytest.mark.parametrize("num_in_flight", [None, 2, 1, 0])
@pytest.mark.parametrize("num_buckets", [1, 3, 14])
def test_gradients_of_any_layout_come_out_of_any_buckets(
    captured: Any, num_in_flight: int | None, num_buckets: int
) -> None:
    model, batch, step, arguments, parameter_of = captured
    buckets = partition(sorted(parameter_of), num_buckets)
    how = Reductions(buckets, num_in_flight, NETWORK, lambda num_bytes: 1e-9 * num_bytes)
    reduced = with_reductions(step, how)
    model.zero_grad()
    loss_of(model, batch).backward()
    for plan in (
        plan_schedule(reduced.joint.graph, None, MACHINE),
        smallest_plan(reduced.joint.graph, MACHINE),
    ):
        reducer, events = Doubling(), Collected()
        program = emit(reduced, plan.schedule)
        with torch.no_grad():
            Frame(program, {"events": events, "reducer": reducer}).run(
                [*arguments, torch.ones(())]
            )
        assert reducer.started == list(range(len(buckets))), "in the order of the buckets"
        assert sorted(reducer.waited) == reducer.started
        for primal, parameter in parameter_of.items():
            assert torch.equal(events.gradients[primal], 2 * parameter.grad), primal


def test_the_fewer_are_under_way_the_fewer_bytes_are_held(captured: Any) -> None:
    _, _, step, _, parameter_of = captured
    order = [o for o in step.consumed_by]
    one_by_one = tuple(step.consumed_by[o] for o in order)
    assert {p for bucket in one_by_one for p in bucket} == {*parameter_of}
    peaks = []
    for count in (None, 2, 1, 0):
        how = Reductions(one_by_one, count, NETWORK, lambda num_bytes: 0.0)
        graph = with_reductions(step, how).joint.graph
        peaks.append(plan_schedule(graph, None, MACHINE).peak_bytes)
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]


def partition(primals: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Return primals in some order in so many parts."""
    shuffled = list(primals)
    random.Random(count).shuffle(shuffled)
    parts = [tuple(shuffled[i::count]) for i in range(count)]
    return tuple(part for part in parts if part)


def test_reductions_are_in_order_whatever_order_gradients_have(captured: Any) -> None:
    _, _, step, _, parameter_of = captured
    one_by_one = tuple((primal,) for primal in sorted(parameter_of))
    for buckets in (one_by_one, one_by_one[::-1]):
        how = Reductions(buckets, 1, NETWORK, lambda num_bytes: 0.0)
        graph = with_reductions(step, how).joint.graph
        reductions = [o for o in graph.operations if o.kind is OperationKind.REDUCE]
        tokens = [o.creates[1] for o in reductions]
        assert [o.reads[-1] for o in reductions[1:]] == tokens[:-1]
        assert all(graph.buffers[token].bytes == 0 for token in tokens)
