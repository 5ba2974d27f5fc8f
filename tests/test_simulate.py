"""Claims about `simulate`: hand-counted schedules, errors, and random ones against a recount."""

from __future__ import annotations

import random

import pytest

from packlight.errors import ScheduleError
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Phase,
    Schedule,
    StepGraph,
    simulate,
)
from tests.oracles.graphs import graphs
from tests.oracles.liveness import plain_order, recount_peak_bytes, schedule_from_order


def run(target: int, overwrite: tuple[int, int] | None = None) -> Instruction:
    return Instruction(Action.RUN, target, overwrite)


def free(target: int) -> Instruction:
    return Instruction(Action.FREE, target)


def one_phase(*instructions: Instruction) -> Schedule:
    return Schedule(instructions, num_forward=len(instructions))


def test_a_freed_input_still_counts_while_its_last_reader_runs() -> None:
    build = GraphBuilder()
    x = build.buffer(1000, BufferKind.INPUT)
    a = build.operation("f", [x], [8], seconds=1.0)[0]
    b = build.operation("g", [a], [4], seconds=2.0)[0]
    c = build.operation("h", [b], [1], seconds=4.0)[0]
    graph = build.finish(3, [c], [c])
    timeline = simulate(graph, one_phase(run(0), run(1), free(a), run(2), free(b)))
    assert timeline.live_bytes == (8, 12, 4, 5, 1)
    assert (timeline.peak_bytes, timeline.peak_index) == (12, 1)
    assert timeline.peak_buffers == (a, b)
    assert timeline.seconds == 7.0


def test_resident_buffers_cost_nothing() -> None:
    build = GraphBuilder()
    resident = [build.buffer(100, kind) for kind in BufferKind if kind.is_resident]
    y = build.operation("f", resident, [8])[0]
    timeline = simulate(build.finish(1, [y], [y, resident[0]]), one_phase(run(0)))
    assert timeline.peak_bytes == 8
    assert timeline.peak_buffers == (y,)


def test_workspace_counts_only_while_its_operation_runs() -> None:
    build = GraphBuilder()
    a = build.operation("conv", [], [10], workspace_bytes=25)[0]
    b = build.operation("f", [a], [20])[0]
    timeline = simulate(build.finish(2, [b], [b]), one_phase(run(0), run(1), free(a)))
    assert timeline.live_bytes == (10, 30, 20)
    assert (timeline.peak_bytes, timeline.peak_index) == (35, 0)
    assert timeline.peak_workspace_bytes == 25
    assert timeline.peak_buffers == (a,)


def test_every_output_of_an_operation_counts_even_if_freed_at_once() -> None:
    build = GraphBuilder()
    y, unused = build.operation("norm", [], [10, 6])
    timeline = simulate(build.finish(1, [y], [y]), one_phase(run(0), free(unused)))
    assert timeline.live_bytes == (16, 10)
    assert timeline.peak_bytes == 16


def test_an_overwriting_operation_allocates_nothing() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [10])[0]
    b = build.operation("relu", [a], [10], workspace_bytes=3, overwrites_read=a)[0]
    graph = build.finish(2, [b], [b])
    in_place = simulate(graph, one_phase(run(0), run(1, overwrite=(b, a))))
    assert in_place.live_bytes == (10, 10)
    assert in_place.peak_bytes == 13
    assert in_place.peak_buffers == (b,)
    out_of_place = simulate(graph, one_phase(run(0), run(1), free(a)))
    assert out_of_place.live_bytes == (10, 20, 10)
    assert out_of_place.peak_bytes == 23


def test_parameter_gradients_pile_up_while_activations_go() -> None:
    build = GraphBuilder()
    a = build.operation("f1", [], [16])[0]
    b = build.operation("f2", [a], [16])[0]
    loss = build.operation("loss", [b], [1])[0]
    gb = build.operation("loss'", [b], [16], phase=Phase.BACKWARD)[0]
    ga, gw2 = build.operation("f2'", [gb, a], [16, 40], phase=Phase.BACKWARD)
    gw1 = build.operation("f1'", [ga], [40], phase=Phase.BACKWARD)[0]
    graph = build.finish(3, [loss], [loss, gw1, gw2])
    instructions = (
        run(0), run(1), run(2), run(3), free(b), run(4), free(a), free(gb), run(5), free(ga),
    )
    timeline = simulate(graph, Schedule(instructions, num_forward=3))
    assert timeline.live_bytes == (16, 32, 33, 49, 33, 89, 73, 57, 97, 81)
    assert (timeline.peak_bytes, timeline.peak_index) == (97, 8)
    assert set(timeline.peak_buffers) == {loss, ga, gw1, gw2}


def recomputable() -> tuple[StepGraph, int, int, int]:
    build = GraphBuilder()
    a = build.operation("f", [], [8], seconds=1.0)[0]
    b = build.operation("g", [a], [4], seconds=1.0)[0]
    c = build.operation("g'", [b, a], [2], seconds=1.0, phase=Phase.BACKWARD)[0]
    return build.finish(2, [b], [b, c]), a, b, c


def test_a_recomputation_costs_its_seconds_again() -> None:
    graph, a, b, c = recomputable()
    schedule = Schedule((run(0), run(1), free(a), run(0), run(2), free(a)), num_forward=3)
    timeline = simulate(graph, schedule)
    assert timeline.seconds == 4.0
    assert timeline.live_bytes == (8, 12, 4, 12, 14, 6)
    assert timeline.peak_buffers == (a, b, c)
    assert schedule.run_counts() == {0: 2, 1: 1, 2: 1}


def test_an_empty_schedule_of_an_empty_graph_costs_nothing() -> None:
    timeline = simulate(GraphBuilder().finish(0, [], []), Schedule((), 0))
    assert (timeline.peak_bytes, timeline.seconds, timeline.live_bytes) == (0, 0.0, ())


ERRORS = {
    "read before creation": (0, [run(1)], "g reads"),
    "read after free": (2, [run(0), free(0), run(1)], "g reads"),
    "freed twice": (3, [run(0), run(1), free(0), free(0)], "freed but not live"),
    "freed before creation": (0, [free(0)], "freed but not live"),
    "created while live": (1, [run(0), run(0)], "creates live buffers"),
    "overwrite not offered": (1, [run(0), run(1, overwrite=(1, 0)), run(2)], "cannot overwrite"),
    "output missing at the end": (
        6, [run(0), run(1), free(0), run(0), run(2), free(2)], "the step ends without",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_schedule_that_cannot_run_names_the_instruction(name: str) -> None:
    index, instructions, message = ERRORS[name]
    graph, *_ = recomputable()
    with pytest.raises(ScheduleError, match=message) as raised:
        simulate(graph, Schedule(tuple(instructions), num_forward=3))
    assert raised.value.instruction_index == index


def test_the_forward_must_end_with_its_outputs_in_memory() -> None:
    graph, a, b, _ = recomputable()
    dropped = (run(0), run(1), free(b), run(1), run(2), free(a))
    with pytest.raises(ScheduleError, match="the forward ends without") as raised:
        simulate(graph, Schedule(dropped, num_forward=3))
    assert raised.value.instruction_index == 3
    simulate(graph, Schedule(dropped, num_forward=4))


def test_a_resident_buffer_cannot_be_freed() -> None:
    build = GraphBuilder()
    x = build.buffer(8, BufferKind.PARAMETER)
    y = build.operation("f", [x], [8])[0]
    with pytest.raises(ScheduleError, match="freed but not live"):
        simulate(build.finish(1, [y], [y]), one_phase(run(0), free(x)))


def test_an_overwritten_buffer_is_gone() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [8])[0]
    b = build.operation("relu", [a], [8], overwrites_read=a)[0]
    c = build.operation("g", [a, b], [8])[0]
    graph = build.finish(3, [c], [c])
    with pytest.raises(ScheduleError, match="g reads"):
        simulate(graph, one_phase(run(0), run(1, overwrite=(b, a)), run(2)))


def test_an_operation_that_must_run_once_cannot_run_again() -> None:
    build = GraphBuilder()
    a = build.operation("batch_norm", [], [8], can_recompute=False)[0]
    graph = build.finish(1, [a], [a])
    with pytest.raises(ScheduleError, match="exactly once"):
        simulate(graph, one_phase(run(0), free(a), run(0)))


def test_an_update_without_results_must_not_be_forgotten() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [8])[0]
    build.operation("count_batches", [a], [], can_recompute=False)
    with pytest.raises(ScheduleError, match="count_batches never runs"):
        simulate(build.finish(2, [a], [a]), one_phase(run(0)))


def random_schedule(graph: StepGraph, seed: int) -> Schedule:
    """Return a valid schedule that keeps, drops, recomputes and frees late by tosses of a coin."""
    draw = random.Random(seed)
    resident = {b.id for b in graph.buffers if b.kind.is_resident}
    creator = {b: op.id for op in graph.operations for b in op.creates}
    keep_chance = draw.random()
    order: list[int] = []
    live: set[int] = set()

    def make(op: int) -> None:
        for buffer in graph.operations[op].reads:
            if buffer not in live and buffer not in resident:
                make(creator[buffer])
        live.update(graph.operations[op].creates)
        order.append(op)

    num_forward = 0
    outputs = set(graph.outputs) | set(graph.forward_outputs)
    # Running an operation again would make an output again that its caller already has.
    pinned = {b for op in graph.operations if outputs & set(op.creates) for b in op.creates}
    for op in graph.operations:
        make(op.id)
        # sorted: sets of ints iterate alike everywhere only by luck.
        live.difference_update(
            b for b in sorted(live - pinned) if draw.random() > keep_chance
        )
        if op.id == graph.num_forward - 1:
            num_forward = len(order)
    schedule = schedule_from_order(graph, order, num_forward, in_place=draw.random() < 0.5)
    return with_late_frees(graph, schedule, draw)


def with_late_frees(graph: StepGraph, schedule: Schedule, draw: random.Random) -> Schedule:
    """Return the schedule with some frees moved to later places, none past a new creation."""
    instructions: list[Instruction] = []
    late: list[Instruction] = []
    num_forward = 0
    for position, instruction in enumerate(schedule.instructions):
        if position == schedule.num_forward:
            num_forward = len(instructions)
        if instruction.action is Action.FREE and draw.random() < 0.3:
            late.append(instruction)
            continue
        creates: tuple[int, ...] = ()
        if instruction.action is Action.RUN:
            creates = graph.operations[instruction.target].creates
        due = [f for f in late if f.target in creates or draw.random() < 0.2]
        instructions += [*due, instruction]
        late = [f for f in late if f not in due]
    return Schedule((*instructions, *late), num_forward)


@pytest.mark.parametrize("name", graphs())
def test_random_schedules_cost_what_a_recount_says(name: str) -> None:
    graph = graphs()[name]
    for seed in range(8):
        schedule = random_schedule(graph, seed)
        timeline = simulate(graph, schedule)
        assert timeline.peak_bytes == recount_peak_bytes(graph, schedule.instructions)
        for end in range(1, len(schedule.instructions), 7):
            part = recount_peak_bytes(graph, schedule.instructions[:end])
            assert (part == timeline.peak_bytes) == (end > timeline.peak_index)
        runs = [i.target for i in schedule.instructions if i.action is Action.RUN]
        assert timeline.seconds == pytest.approx(sum(graph.operations[r].seconds for r in runs))
        assert timeline.live_bytes[-1] == sum(graph.buffers[b].bytes for b in set(graph.outputs))


@pytest.mark.parametrize("name", graphs())
def test_plain_schedule_runs_every_operation_once(name: str) -> None:
    graph = graphs()[name]
    schedule = plain_order(graph)
    assert simulate(graph, schedule).seconds == pytest.approx(graph.seconds)
    assert set(schedule.run_counts().values()) == {1}
