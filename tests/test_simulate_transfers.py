"""Claims about transfers in `simulate`: timelines counted by hand, and everything illegal."""

from __future__ import annotations

import random

import pytest

from packlight.errors import ScheduleError
from packlight.step import (
    Action,
    BufferKind,
    Device,
    GraphBuilder,
    Instruction,
    Link,
    Phase,
    Schedule,
    StepGraph,
    Transfer,
    live_after_forward,
    simulate,
)
from packlight.step.serialize import from_json, to_json
from tests.oracles.graphs import graphs
from tests.oracles.liveness import plain_order, recount_peak_bytes, recount_seconds

# One byte per second each way: seconds are bytes.
DEVICE = Device("hand", 1000, links=(Link("disk", 1.0),))


def run(target: int, overwrite: tuple[int, int] | None = None) -> Instruction:
    return Instruction(Action.COMPUTE, target, overwrite)


def free(target: int) -> Instruction:
    return Instruction(Action.FREE, target)


def offload(target: int) -> Instruction:
    return Instruction(Action.OFFLOAD, target)


def fetch(target: int) -> Instruction:
    return Instruction(Action.FETCH, target)


def there_and_back(middle_seconds: float) -> tuple[StepGraph, int, int, int]:
    """Return a step that reads its first buffer, a (4 bytes), again after a long operation."""
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("g", [a], [2], seconds=1.0)[0]
    c = build.operation("h", [b], [2], seconds=middle_seconds)[0]
    d = build.operation("f'", [c, a], [1], seconds=1.0, phase=Phase.BACKWARD)[0]
    return build.finish(3, [c], [c, d]), a, b, c


def test_transfers_run_beside_operations() -> None:
    graph, a, b, _ = there_and_back(20.0)
    instructions = (
        run(0), offload(a), run(1), free(a), fetch(a), run(2), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), DEVICE)
    # f ends at 1; the write takes until 5, while g runs until 2: its FREE waits for 3 s. The fetch
    # is over at 9, in the middle of h, which runs from 5 to 25.
    assert timeline.live_bytes == (4, 4, 6, 2, 6, 8, 6, 7, 3)
    assert timeline.seconds == 26.0
    assert (timeline.link_seconds, timeline.wait_seconds) == (8.0, 3.0)
    assert (timeline.peak_bytes, timeline.peak_index) == (8, 5)
    assert timeline.transfers == (
        Transfer(Action.OFFLOAD, a, 1.0, 5.0), Transfer(Action.FETCH, a, 5.0, 9.0),
    )
    assert timeline.done_seconds == (1.0, 1.0, 2.0, 5.0, 5.0, 25.0, 25.0, 26.0, 26.0)


def test_a_free_that_comes_late_enough_does_not_wait() -> None:
    graph, a, b, _ = there_and_back(20.0)
    instructions = (
        run(0), offload(a), run(1), run(2), free(a), free(b), fetch(a), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 6), DEVICE)
    # h ends at 22; nobody waits for the write, the last operation waits for the whole fetch.
    assert (timeline.seconds, timeline.wait_seconds) == (27.0, 4.0)
    assert timeline.peak_bytes == 8


def test_each_way_has_its_bandwidth_and_each_transfer_its_latency() -> None:
    graph, a, b, _ = there_and_back(0.0)
    device = Device("uneven", 1000, links=(Link("disk", 4.0, 0.5, write_bytes_per_second=2.0),))
    instructions = (
        run(0), offload(a), run(1), free(a), run(2), free(b), fetch(a), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 6), device)
    # Written from 1 to 3.5 (g is over at 2), read until 5, then one second of f'.
    assert timeline.link_seconds == 2.5 + 1.5
    assert timeline.wait_seconds == 1.5 + 1.5
    assert timeline.seconds == 6.0


def test_what_copies_cannot_compute() -> None:
    graph, a, b, _ = there_and_back(20.0)
    device = Device("busy", 1000, links=(Link("disk", 1.0, compute_share=0.25),))
    instructions = (
        run(0), offload(a), run(1), free(a), fetch(a), run(2), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), device)
    # As above, but g ends at 3 (one second is lost to the write, which takes until 5), and the
    # fetch takes another one from h, which so ends at 5 + 1 + 20.
    assert (timeline.link_seconds, timeline.wait_seconds) == (8.0, 2.0)
    assert timeline.seconds == 27.0


def test_transfers_queue_in_the_order_in_which_they_are_issued() -> None:
    build = GraphBuilder()
    a, b = build.operation("f", [], [4, 3], seconds=1.0)
    c = build.operation("g", [a, b], [1], seconds=2.0)[0]
    d = build.operation("h", [b], [1], seconds=1.0)[0]
    e = build.operation("i", [a], [1], seconds=1.0)[0]
    graph = build.finish(4, [], [c, d, e])
    instructions = (
        run(0), offload(a), offload(b), run(1), free(b), free(a), fetch(b), fetch(a),
        run(2), run(3), free(a), free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 12), DEVICE)
    # a is written at 5, b at 8 (its FREE waits from 3 to 8), b is back at 11, a at 15.
    assert timeline.live_bytes[:8] == (7, 7, 7, 8, 5, 1, 4, 8)
    assert timeline.seconds == 16.0
    assert timeline.wait_seconds == (8 - 3) + (11 - 8) + (15 - 12)


def test_a_fetch_counts_from_its_issue_and_may_be_the_peak() -> None:
    graph, a, b, c = there_and_back(0.0)
    instructions = (
        run(0), offload(a), run(1), free(a), run(2), fetch(a), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), DEVICE)
    assert timeline.live_bytes == (4, 4, 6, 2, 4, 8, 6, 7, 3)
    assert (timeline.peak_bytes, timeline.peak_index) == (8, 5)
    assert timeline.peak_buffers == (a, b, c)


def test_an_overwrite_waits_for_the_write_of_what_it_overwrites() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("relu", [a], [4], seconds=1.0, overwrites_read=a)[0]
    c = build.operation("g", [b, a], [1], seconds=1.0)[0]
    graph = build.finish(3, [c], [c])
    instructions = (
        run(0), offload(a), run(1, overwrite=(b, a)), fetch(a), run(2), free(a), free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 7), DEVICE)
    # relu runs from 5 to 6, a is back at 10.
    assert timeline.live_bytes == (4, 4, 4, 8, 9, 5, 1)
    assert timeline.seconds == 11.0


def test_a_copy_stays_valid_when_its_buffer_is_computed_again() -> None:
    graph, a, b, _ = there_and_back(4.0)
    instructions = (
        run(0), offload(a), run(1), free(a), run(0), free(a), run(2), free(b), fetch(a), run(3),
        free(a),
    )
    assert simulate(graph, Schedule(instructions, 8), DEVICE).link_seconds == 8.0


def test_a_free_of_what_is_being_fetched_waits() -> None:
    graph, a, b, _ = there_and_back(0.0)
    instructions = (
        run(0), offload(a), run(1), free(a), fetch(a), free(a), fetch(a), run(2), run(3), free(a),
        free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 8), DEVICE)
    # Written at 5, read at 9 and at 13.
    assert timeline.seconds == 14.0


def test_the_forward_hands_out_what_is_there() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("g", [], [4], seconds=1.0)[0]
    graph = build.finish(2, [a], [a, b])
    instructions = (run(0), offload(a), free(a), fetch(a), run(1))
    assert simulate(graph, Schedule(instructions, 5), DEVICE).seconds == 9.0
    late = (run(0), offload(a), run(1), free(a), fetch(a))
    assert simulate(graph, Schedule(late, 5), DEVICE).seconds == 9.0


def training() -> tuple[StepGraph, dict[str, int]]:
    """Return two layers with stored parameters, and one state, updated in the step."""
    build = GraphBuilder()
    x = build.buffer(8, BufferKind.INPUT)
    w1 = build.buffer(10, BufferKind.PARAMETER, "w1")
    w2 = build.buffer(10, BufferKind.PARAMETER, "w2")
    s2 = build.buffer(10, BufferKind.STATE, "s2")
    a = build.operation("f1", [x, w1], [2], seconds=20.0)[0]
    loss = build.operation("f2", [a, w2], [1], seconds=20.0)[0]
    back = {"phase": Phase.BACKWARD}
    ga, g2 = build.operation("f2'", [a, w2], [2, 10], seconds=20.0, **back)
    g1 = build.operation("f1'", [x, ga], [10], seconds=20.0, **back)[0]
    update = {"phase": Phase.UPDATE, "can_recompute": False}
    build.operation("u2", [g2, loss, w2, s2], [], seconds=5.0, mutates=[w2, s2], **update)
    build.operation("u1", [g1, loss, w1], [], seconds=5.0, mutates=[w1], **update)
    graph = build.finish(2, [loss], [loss], stored=[w1, w2, s2])
    names = {"w1": w1, "w2": w2, "s2": s2, "a": a, "ga": ga, "g1": g1, "g2": g2}
    return graph, names


def streamed(**left_out: bool) -> list[Instruction]:
    """Return the step of `training` with its parameters streamed, or without some instruction."""
    _, at = training()
    all_of_it = {
        "get_w1": fetch(at["w1"]), "get_w2": fetch(at["w2"]), "f1": run(0),
        "drop_w1": free(at["w1"]),
        "f2": run(1), "f2'": run(2), "free_a": free(at["a"]), "get_s2": fetch(at["s2"]),
        "u2": run(4), "put_w2": offload(at["w2"]), "put_s2": offload(at["s2"]),
        "free_g2": free(at["g2"]), "f1'": run(3), "free_ga": free(at["ga"]),
        "drop_w2": free(at["w2"]), "drop_s2": free(at["s2"]),
        "again_w1": fetch(at["w1"]), "u1": run(5), "put_w1": offload(at["w1"]),
        "free_g1": free(at["g1"]), "end_w1": free(at["w1"]),
    }
    return [i for name, i in all_of_it.items() if not left_out.get(name)]


def test_stored_parameters_are_streamed_through_a_smaller_memory() -> None:
    graph, at = training()
    schedule = Schedule(tuple(streamed()), 5)
    timeline = simulate(graph, schedule, DEVICE)
    # w1 is there at 10, f1 ends at 30, f2 at 50, f2' at 70; s2 at 80, u2 ends at 85; w2 and s2 are
    # written at 95 and 105, f1' ends at 105, w1 comes until 115, u1 ends at 120, written at 130.
    assert timeline.seconds == 130.0
    assert timeline.wait_seconds == 10 + 10 + 10 + 10
    assert timeline.link_seconds == 70.0
    assert timeline.peak_bytes == recount_peak_bytes(graph, schedule.instructions) == 33
    assert live_after_forward(graph, schedule) == {at["w2"], at["a"], 5}
    assert recount_seconds(graph, schedule, DEVICE) == 130.0


def test_resident_parameters_of_the_same_step_cost_nothing() -> None:
    graph, at = training()
    bare = StepGraph(graph.operations, graph.buffers, 2, graph.forward_outputs, graph.outputs)
    assert {at["w1"], at["w2"], at["s2"]} == bare.resident - graph.resident
    compute = [i for i in streamed() if i.action is Action.COMPUTE]
    assert simulate(bare, Schedule(tuple(compute), 2)).seconds == 90.0
    assert from_json(to_json(graph)) == graph != bare


STREAMING_ERRORS = {
    "get_w1": "reads buffers",
    "again_w1": "reads buffers",
    "put_w2": "its update not written",
    "end_w1": "stored buffers .* in memory",
    "drop_w1": "in memory already",
}


@pytest.mark.parametrize("left_out", STREAMING_ERRORS)
def test_streaming_that_forgets_something_is_refused(left_out: str) -> None:
    graph, _ = training()
    instructions = streamed(**{left_out: True})
    forgotten = Schedule(tuple(instructions), instructions.index(run(2)))
    with pytest.raises(ScheduleError, match=STREAMING_ERRORS[left_out]):
        simulate(graph, forgotten, DEVICE)


def test_an_update_must_be_written_before_the_step_ends() -> None:
    graph, _ = training()
    with pytest.raises(ScheduleError, match="updates of .* not written"):
        simulate(graph, Schedule(tuple(streamed(put_w1=True, end_w1=True)), 5), DEVICE)


def test_an_update_waits_for_a_write_of_what_it_updates() -> None:
    build = GraphBuilder()
    w = build.buffer(10, BufferKind.PARAMETER)
    build.operation("u", [w], [], seconds=1.0, mutates=[w], can_recompute=False)
    build.operation("v", [], [], seconds=1.0, mutates=[w], can_recompute=False)
    graph = build.finish(0, [], [], stored=[w])
    once = (fetch(w), run(0), offload(w), run(1), offload(w), free(w))
    timeline = simulate(graph, Schedule(once, 0), DEVICE)
    # There at 10, updated at 11, written at 21, updated at 22, written at 32.
    assert timeline.seconds == 32.0
    with pytest.raises(ScheduleError, match="its update not written"):
        simulate(graph, Schedule(once[:4] + once[5:], 0), DEVICE)


ERRORS = {
    "offload of what is not live": (0, [offload(0)], "offloaded but not live"),
    "offload of what was freed": (2, [run(0), free(0), offload(0)], "offloaded but not live"),
    "offload of a resident": (0, [offload(4)], "resident buffer"),
    "offload twice": (2, [run(0), offload(0), offload(0)], "on the far tier already"),
    "fetch of what was never written": (2, [run(0), free(0), fetch(0)], "not on the far tier"),
    "fetch of what is live": (2, [run(0), offload(0), fetch(0)], "in memory already"),
    "read without a fetch": (3, [run(0), offload(0), free(0), run(1)], "g reads"),
    "computed while fetched": (
        4, [run(0), offload(0), free(0), fetch(0), run(0)], "creates live buffers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_transfer_that_cannot_be_names_the_instruction(name: str) -> None:
    index, instructions, message = ERRORS[name]
    build = GraphBuilder()
    for reads in ([], [0], [1], [2, 0]):
        build.operation("fghi"[build_length(build)], reads, [4])
    build.buffer(8, BufferKind.PARAMETER)
    graph = build.finish(4, [], [3])
    with pytest.raises(ScheduleError, match=message) as raised:
        simulate(graph, Schedule(tuple(instructions), 0), DEVICE)
    assert raised.value.instruction_index == index


def build_length(build: GraphBuilder) -> int:
    return len(build.finish(0, [], []).operations)


@pytest.mark.parametrize("stored", [[0], [7], [1]])
def test_only_parameters_and_states_can_be_stored(stored: list[int]) -> None:
    build = GraphBuilder()
    build.buffer(8, BufferKind.INPUT)
    a = build.operation("f", [0], [8])[0]
    with pytest.raises(ValueError, match="neither parameters nor states"):
        build.finish(1, [a], [a], stored=stored)


def test_transfers_need_a_device_with_a_link() -> None:
    graph, a, *_ = there_and_back(1.0)
    for device in (None, Device("bare", 1000)):
        with pytest.raises(ScheduleError, match="without a device with a link"):
            simulate(graph, Schedule((run(0), offload(a)), 2), device)


def with_transfers(graph: StepGraph, schedule: Schedule, seed: int) -> Schedule:
    """Return a schedule with buffers sent away and brought back at random places."""
    draw = random.Random(seed)
    reads = [
        set(graph.operations[i.target].reads) if i.action is Action.COMPUTE else {i.target}
        for i in schedule.instructions
    ]
    pinned = set(graph.forward_outputs)
    instructions: list[Instruction] = []
    live: set[int] = set()
    far: set[int] = set()
    num_forward = 0
    for position, instruction in enumerate(schedule.instructions):
        if position == schedule.num_forward:
            num_forward = len(instructions)
        missing = sorted((reads[position] & far) - live)
        instructions += [fetch(b) for b in missing]
        live |= set(missing)
        instructions.append(instruction)
        if instruction.action is Action.FREE:
            live.remove(instruction.target)
            far.discard(instruction.target)
        else:
            live |= set(graph.operations[instruction.target].creates)
            if instruction.overwrite is not None:
                live.remove(instruction.overwrite[1])
                far.discard(instruction.overwrite[1])
        for buffer in sorted(live - pinned):
            if buffer not in far and draw.random() < 0.2:
                instructions.append(offload(buffer))
                far.add(buffer)
            elif buffer in far and draw.random() < 0.3:
                instructions.append(free(buffer))
                live.remove(buffer)
        for buffer in sorted(far - live):
            if draw.random() < 0.1:
                instructions.append(fetch(buffer))
                live.add(buffer)
    instructions += [fetch(b) for b in sorted(set(graph.outputs) - live)]
    return Schedule(tuple(instructions), num_forward)


@pytest.mark.parametrize("name", graphs())
def test_random_transfers_cost_what_a_recount_says(name: str) -> None:
    graph = graphs()[name]
    for seed in range(6):
        share = 0.2 * (seed % 4)
        link = Link("disk", 2e6 * (1 + seed % 3), 1e-4 * (seed % 2), 3e6, share)
        device = Device("some", 1 << 30, links=(link,))
        schedule = with_transfers(graph, plain_order(graph), seed)
        timeline = simulate(graph, schedule, device)
        assert timeline.peak_bytes == recount_peak_bytes(graph, schedule.instructions)
        assert timeline.seconds == pytest.approx(recount_seconds(graph, schedule, device))
        copying = share * timeline.link_seconds
        assert timeline.wait_seconds == pytest.approx(timeline.seconds - graph.seconds - copying)
        moved = [i for i in schedule.instructions if i.action in (Action.OFFLOAD, Action.FETCH)]
        assert (timeline.link_seconds > 0) == bool(moved)
