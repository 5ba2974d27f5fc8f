"""Claims about transfers in `simulate`: timelines counted by hand, and everything illegal."""

from __future__ import annotations

import random

import pytest

from packlight.errors import ScheduleError
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Lane,
    LaneRun,
    Machine,
    Memory,
    OperationKind,
    Phase,
    Schedule,
    Speed,
    StepGraph,
    live_after_forward,
    simulate,
    with_transfers,
)
from packlight.step.serialize import from_json, to_json
from tests.oracles import one_link
from tests.oracles.graphs import graphs
from tests.oracles.liveness import plain_order, recount_peak_bytes, recount_seconds
from tests.oracles.machines import lane, one_lane, read, several_lanes, write
from tests.oracles.one_link import OldInstruction, OldSchedule, judged, translated

# One byte per second each way: seconds are bytes.
MACHINE = one_lane(1.0)


def run(target: int, overwrite: tuple[int, int] | None = None) -> Instruction:
    return Instruction(Action.RUN, target, overwrite)


def free(target: int) -> Instruction:
    return Instruction(Action.FREE, target)


def there_and_back(
    middle_seconds: float, machine: Machine = MACHINE
) -> tuple[StepGraph, int, int, int]:
    """Return a step that reads its first buffer, a (4 bytes), again after a long operation."""
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("g", [a], [2], seconds=1.0)[0]
    c = build.operation("h", [b], [2], seconds=middle_seconds)[0]
    d = build.operation("f'", [c, a], [1], seconds=1.0, phase=Phase.BACKWARD)[0]
    return with_transfers(build.finish(3, [c], [c, d]), machine), a, b, c


def test_transfers_run_beside_operations() -> None:
    graph, a, b, _ = there_and_back(20.0)
    instructions = (
        run(0), write(graph, a), run(1), free(a), read(graph, a), run(2), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), MACHINE)
    # f ends at 1; the write takes until 5, while g runs until 2: its FREE waits for 3 s. The fetch
    # is over at 9, in the middle of h, which runs from 5 to 25.
    assert timeline.live_bytes == (4, 4, 6, 2, 6, 8, 6, 7, 3)
    assert timeline.seconds == 26.0
    assert (timeline.lane_seconds, timeline.wait_seconds) == (8.0, 3.0)
    assert (timeline.peak_bytes, timeline.peak_index) == (8, 5)
    moves = write(graph, a).target, read(graph, a).target
    assert timeline.lanes[0].runs == (LaneRun(moves[0], 1.0, 5.0), LaneRun(moves[1], 5.0, 9.0))
    assert timeline.far_peak_bytes == (("disk", 4),)
    assert timeline.done_seconds == (1.0, 1.0, 2.0, 5.0, 5.0, 25.0, 25.0, 26.0, 26.0)


def test_a_free_that_comes_late_enough_does_not_wait() -> None:
    graph, a, b, _ = there_and_back(20.0)
    instructions = (
        run(0), write(graph, a), run(1), run(2), free(a), free(b), read(graph, a), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 6), MACHINE)
    # h ends at 22; nobody waits for the write, the last operation waits for the whole fetch.
    assert (timeline.seconds, timeline.wait_seconds) == (27.0, 4.0)
    assert timeline.peak_bytes == 8


def test_each_way_has_its_bandwidth_and_each_transfer_its_latency() -> None:
    machine = one_lane(4.0, 0.5, write_bytes_per_second=2.0)
    graph, a, b, _ = there_and_back(0.0, machine)
    instructions = (
        run(0), write(graph, a), run(1), free(a), run(2), free(b), read(graph, a), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 6), machine)
    # Written from 1 to 3.5 (g is over at 2), read until 5, then one second of f'.
    assert timeline.lane_seconds == 2.5 + 1.5
    assert timeline.wait_seconds == 1.5 + 1.5
    assert timeline.seconds == 6.0


def test_what_copies_cannot_compute() -> None:
    machine = one_lane(1.0, compute_share=0.25)
    graph, a, b, _ = there_and_back(20.0, machine)
    instructions = (
        run(0), write(graph, a), run(1), free(a), read(graph, a), run(2), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), machine)
    # As above, but g ends at 3 (one second is lost to the write, which takes until 5), and the
    # fetch takes another one from h, which so ends at 5 + 1 + 20.
    assert (timeline.lane_seconds, timeline.wait_seconds) == (8.0, 2.0)
    assert timeline.seconds == 27.0


def test_transfers_queue_in_the_order_in_which_they_are_issued() -> None:
    build = GraphBuilder()
    a, b = build.operation("f", [], [4, 3], seconds=1.0)
    c = build.operation("g", [a, b], [1], seconds=2.0)[0]
    d = build.operation("h", [b], [1], seconds=1.0)[0]
    e = build.operation("i", [a], [1], seconds=1.0)[0]
    graph = with_transfers(build.finish(4, [], [c, d, e]), MACHINE)
    instructions = (
        run(0), write(graph, a), write(graph, b), run(1), free(b), free(a), read(graph, b),
        read(graph, a), run(2), run(3), free(a), free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 12), MACHINE)
    # a is written at 5, b at 8 (its FREE waits from 3 to 8), b is back at 11, a at 15.
    assert timeline.live_bytes[:8] == (7, 7, 7, 8, 5, 1, 4, 8)
    assert timeline.seconds == 16.0
    assert timeline.wait_seconds == (8 - 3) + (11 - 8) + (15 - 12)


def test_a_fetch_counts_from_its_issue_and_may_be_the_peak() -> None:
    graph, a, b, c = there_and_back(0.0)
    instructions = (
        run(0), write(graph, a), run(1), free(a), run(2), read(graph, a), free(b), run(3), free(a),
    )
    timeline = simulate(graph, Schedule(instructions, 7), MACHINE)
    assert timeline.live_bytes == (4, 4, 6, 2, 4, 8, 6, 7, 3)
    assert (timeline.peak_bytes, timeline.peak_index) == (8, 5)
    assert timeline.peak_buffers == (a, b, c)


def test_an_overwrite_waits_for_the_write_of_what_it_overwrites() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("relu", [a], [4], seconds=1.0, overwrites_read=a)[0]
    c = build.operation("g", [b, a], [1], seconds=1.0)[0]
    graph = with_transfers(build.finish(3, [c], [c]), MACHINE)
    instructions = (
        run(0), write(graph, a), run(1, overwrite=(b, a)), read(graph, a), run(2), free(a), free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 7), MACHINE)
    # relu runs from 5 to 6, a is back at 10.
    assert timeline.live_bytes == (4, 4, 4, 8, 9, 5, 1)
    assert timeline.seconds == 11.0


def test_a_copy_stays_valid_when_its_buffer_is_computed_again() -> None:
    graph, a, b, _ = there_and_back(4.0)
    instructions = (
        run(0), write(graph, a), run(1), free(a), run(0), free(a), run(2), free(b), read(graph, a),
        run(3), free(a),
    )
    assert simulate(graph, Schedule(instructions, 8), MACHINE).lane_seconds == 8.0


def test_a_free_of_what_is_being_fetched_waits() -> None:
    graph, a, b, _ = there_and_back(0.0)
    instructions = (
        run(0), write(graph, a), run(1), free(a), read(graph, a), free(a), read(graph, a), run(2),
        run(3), free(a), free(b),
    )
    timeline = simulate(graph, Schedule(instructions, 8), MACHINE)
    # Written at 5, read at 9 and at 13.
    assert timeline.seconds == 14.0


def test_the_forward_hands_out_what_is_there() -> None:
    build = GraphBuilder()
    a = build.operation("f", [], [4], seconds=1.0)[0]
    b = build.operation("g", [], [4], seconds=1.0)[0]
    graph = with_transfers(build.finish(2, [a], [a, b]), MACHINE)
    instructions = (run(0), write(graph, a), free(a), read(graph, a), run(1))
    assert simulate(graph, Schedule(instructions, 5), MACHINE).seconds == 9.0
    late = (run(0), write(graph, a), run(1), free(a), read(graph, a))
    assert simulate(graph, Schedule(late, 5), MACHINE).seconds == 9.0


def training() -> tuple[StepGraph, dict[str, int]]:
    """Return two layers whose parameters, and one state, rest on the disk and are updated."""
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
    graph = with_transfers(build.finish(2, [loss], [loss]), MACHINE, [w1, w2, s2])
    names = {"w1": w1, "w2": w2, "s2": s2, "a": a, "ga": ga, "g1": g1, "g2": g2}
    return graph, names


def streamed(**left_out: bool) -> list[Instruction]:
    """Return the step of `training` with its parameters streamed, or without some instruction."""
    graph, at = training()
    all_of_it = {
        "get_w1": read(graph, at["w1"]), "get_w2": read(graph, at["w2"]), "f1": run(0),
        "drop_w1": free(at["w1"]),
        "f2": run(1), "f2'": run(2), "free_a": free(at["a"]), "get_s2": read(graph, at["s2"]),
        "u2": run(4), "put_w2": write(graph, at["w2"]), "put_s2": write(graph, at["s2"]),
        "free_g2": free(at["g2"]), "f1'": run(3), "free_ga": free(at["ga"]),
        "drop_w2": free(at["w2"]), "drop_s2": free(at["s2"]),
        "again_w1": read(graph, at["w1"]), "u1": run(5), "put_w1": write(graph, at["w1"]),
        "free_g1": free(at["g1"]), "end_w1": free(at["w1"]),
    }
    return [i for name, i in all_of_it.items() if not left_out.get(name)]


def test_parameters_that_rest_elsewhere_are_streamed_through_a_smaller_memory() -> None:
    graph, at = training()
    schedule = Schedule(tuple(streamed()), 5)
    timeline = simulate(graph, schedule, MACHINE)
    # w1 is there at 10, f1 ends at 30, f2 at 50, f2' at 70; s2 at 80, u2 ends at 85; w2 and s2 are
    # written at 95 and 105, f1' ends at 105, w1 comes until 115, u1 ends at 120, written at 130.
    assert timeline.seconds == 130.0
    assert timeline.wait_seconds == 10 + 10 + 10 + 10
    assert timeline.lane_seconds == 70.0
    assert timeline.peak_bytes == recount_peak_bytes(graph, schedule.instructions) == 33
    assert live_after_forward(graph, schedule) == {at["w2"], at["a"], 5}
    assert recount_seconds(graph, schedule, MACHINE) == 130.0


def test_resident_parameters_of_the_same_step_cost_nothing() -> None:
    graph, at = training()
    bare = graph.without_transfers()
    assert {at["w1"], at["w2"], at["s2"]} == bare.resident - graph.resident == {*graph.resting}
    compute = [i for i in streamed() if i.action is Action.RUN and i.target < 6]
    assert simulate(bare, Schedule(tuple(compute), 2)).seconds == 90.0
    assert from_json(to_json(graph)) == graph != bare


STREAMING_ERRORS = {
    "get_w1": "reads buffers",
    "again_w1": "reads buffers",
    "put_w2": "its update not written",
    "end_w1": "in memory, which rest elsewhere",
    "drop_w1": "creates live buffers",
}


@pytest.mark.parametrize("left_out", STREAMING_ERRORS)
def test_streaming_that_forgets_something_is_refused(left_out: str) -> None:
    graph, _ = training()
    instructions = streamed(**{left_out: True})
    forgotten = Schedule(tuple(instructions), instructions.index(run(2)))
    with pytest.raises(ScheduleError, match=STREAMING_ERRORS[left_out]):
        simulate(graph, forgotten, MACHINE)


def test_an_update_must_be_written_before_the_step_ends() -> None:
    graph, _ = training()
    with pytest.raises(ScheduleError, match="updates of .* not written"):
        simulate(graph, Schedule(tuple(streamed(put_w1=True, end_w1=True)), 5), MACHINE)


def test_an_update_waits_for_a_write_of_what_it_updates() -> None:
    build = GraphBuilder()
    w = build.buffer(10, BufferKind.PARAMETER)
    build.operation("u", [w], [], seconds=1.0, mutates=[w], can_recompute=False)
    build.operation("v", [], [], seconds=1.0, mutates=[w], can_recompute=False)
    graph = with_transfers(build.finish(0, [], []), MACHINE, [w])
    once = (read(graph, w), run(0), write(graph, w), run(1), write(graph, w), free(w))
    timeline = simulate(graph, Schedule(once, 0), MACHINE)
    # There at 10, updated at 11, written at 21, updated at 22, written at 32.
    assert timeline.seconds == 32.0
    with pytest.raises(ScheduleError, match="its update not written"):
        simulate(graph, Schedule(once[:4] + once[5:], 0), MACHINE)


WRITE, READ = OperationKind.WRITE, OperationKind.READ
# What happens to buffer 0 before which instruction is refused, and how.
ERRORS = {
    "write of what is not live": (0, [(WRITE, 0)], "write reads buffers .0."),
    "write of what was freed": (2, [run(0), free(0), (WRITE, 0)], "write reads buffers .0."),
    "write twice": (2, [run(0), (WRITE, 0), (WRITE, 0)], "write creates live buffers"),
    "read of what was never written": (2, [run(0), free(0), (READ, 0)], "read reads buffers"),
    "read of what is live": (2, [run(0), (WRITE, 0), (READ, 0)], "read creates live buffers"),
    "use without a read": (3, [run(0), (WRITE, 0), free(0), run(1)], "g reads"),
    "computed while read": (
        4, [run(0), (WRITE, 0), free(0), (READ, 0), run(0)], "creates live buffers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_transfer_that_cannot_be_names_the_instruction(name: str) -> None:
    index, steps, message = ERRORS[name]
    build = GraphBuilder()
    for letter, reads in zip("fghi", ([], [0], [1], [2, 0]), strict=True):
        build.operation(letter, reads, [4])
    build.buffer(8, BufferKind.PARAMETER)
    graph = with_transfers(build.finish(4, [], [3]), MACHINE)
    move = {WRITE: write, READ: read}
    instructions = [s if isinstance(s, Instruction) else move[s[0]](graph, s[1]) for s in steps]
    with pytest.raises(ScheduleError, match=message) as raised:
        simulate(graph, Schedule(tuple(instructions), 0), MACHINE)
    assert raised.value.instruction_index == index


def test_a_copy_that_was_freed_cannot_be_read() -> None:
    graph, a, *_ = there_and_back(1.0)
    (copy,) = graph.operations[write(graph, a).target].creates
    instructions = (run(0), write(graph, a), free(copy), free(a), read(graph, a))
    with pytest.raises(ScheduleError, match=f"read reads buffers .{copy}.") as raised:
        simulate(graph, Schedule(instructions, 5), MACHINE)
    assert raised.value.instruction_index == 4


@pytest.mark.parametrize("resting", [[0], [7], [1]])
def test_only_parameters_and_states_can_rest_elsewhere(resting: list[int]) -> None:
    build = GraphBuilder()
    build.buffer(8, BufferKind.INPUT)
    a = build.operation("f", [0], [8])[0]
    with pytest.raises(ValueError, match="neither parameters nor states"):
        with_transfers(build.finish(1, [a], [a]), MACHINE, resting)


def test_what_rests_elsewhere_needs_a_lane_and_room() -> None:
    build = GraphBuilder()
    w = build.buffer(8, BufferKind.PARAMETER, "w")
    build.operation("u", [w], [], mutates=[w], can_recompute=False)
    graph = build.finish(0, [], [])
    reading = Lane("tape", "tape", Speed(1.0), None)
    small = Machine((Memory("disk", 7),), MACHINE.lanes)
    for machine in (Machine(), several_lanes(reading), small):
        with pytest.raises(ValueError, match="nowhere for w .8 bytes. to rest"):
            with_transfers(graph, machine, [w])
    assert with_transfers(graph, Machine((Memory("disk", 8),), MACHINE.lanes), [w]).resting


def test_transfers_need_a_machine_with_their_lane() -> None:
    graph, a, *_ = there_and_back(1.0)
    for machine in (None, Machine(), several_lanes(lane("tape", 1.0))):
        with pytest.raises(ScheduleError, match="without a machine with a lane 'disk'"):
            simulate(graph, Schedule((run(0), write(graph, a)), 2), machine)


# Several lanes at once.


def two_disks(**speeds: float) -> Machine:
    """Return a machine with disks "one" and "two", each of its own speed."""
    return several_lanes(*(lane(name, speed) for name, speed in speeds.items()))


def two_there_and_back(machine: Machine) -> StepGraph:
    """Return a step that makes buffers 0 and 1 (4 bytes each) and reads both after a while."""
    build = GraphBuilder()
    a, b = build.operation("f", [], [4, 4], seconds=1.0)
    c = build.operation("g", [a, b], [1], seconds=2.0)[0]
    d = build.operation("h", [a, b], [1], seconds=1.0, phase=Phase.BACKWARD)[0]
    return with_transfers(build.finish(2, [c], [c, d]), machine)


def test_two_disks_move_two_buffers_at_the_same_time() -> None:
    machine = two_disks(one=1.0, two=2.0)
    graph = two_there_and_back(machine)
    instructions = (
        run(0), write(graph, 0, "one"), write(graph, 1, "two"), run(1), free(1), free(0),
        read(graph, 0, "one"), read(graph, 1, "two"), run(2), free(0), free(1),
    )
    schedule = Schedule(instructions, 6)
    timeline = simulate(graph, schedule, machine)
    # Written from 1 to 5 and from 1 to 3, when g ends; b's FREE need not wait, a's waits 2 s. Read
    # from 5 to 9 and from 5 to 7.
    assert [lane.name for lane in timeline.lanes] == ["one", "two"]
    spans = [[(r.start_seconds, r.end_seconds) for r in lane.runs] for lane in timeline.lanes]
    assert spans == [[(1.0, 5.0), (5.0, 9.0)], [(1.0, 3.0), (5.0, 7.0)]]
    assert [lane.busy_seconds for lane in timeline.lanes] == [8.0, 4.0]
    assert (timeline.seconds, timeline.wait_seconds) == (10.0, 2.0 + 4.0)
    assert timeline.far_peak_bytes == (("one", 4), ("two", 4))
    assert recount_seconds(graph, schedule, machine) == 10.0
    slow = (
        run(0), write(graph, 0, "one"), write(graph, 1, "one"), run(1), free(1), free(0),
        read(graph, 0, "one"), read(graph, 1, "one"), run(2), free(0), free(1),
    )
    # On one of them: written at 5 and 9, read at 13 and 17.
    assert simulate(graph, Schedule(slow, 6), machine).seconds == 18.0


def test_a_copy_engine_each_way_reads_no_sooner_than_was_written() -> None:
    out = Lane("to host", "host", None, Speed(1.0))
    back = Lane("from host", "host", Speed(2.0), None)
    machine = several_lanes(out, back)
    graph = two_there_and_back(machine)
    instructions = (
        run(0), write(graph, 0), run(1), write(graph, 1), free(0), read(graph, 0), free(1),
        read(graph, 1), run(2), free(0), free(1),
    )
    schedule = Schedule(instructions, 5)
    timeline = simulate(graph, schedule, machine)
    # a is written from 1 to 5 and b until 9. a comes back from 5 to 7, while b is being written;
    # b's FREE waits for that, and b is back at 11.
    assert [(r.start_seconds, r.end_seconds) for r in timeline.lanes[1].runs] == [(5, 7), (9, 11)]
    assert timeline.seconds == recount_seconds(graph, schedule, machine) == 12.0
    assert timeline.far_peak_bytes == (("host", 8),)


def test_a_lane_waits_for_what_another_lane_brings() -> None:
    """A buffer is read from one disk and at once handed to the other, which is idle."""
    machine = two_disks(one=1.0, two=4.0)
    graph = two_there_and_back(machine)
    instructions = (
        run(0), write(graph, 0, "one"), run(1), free(0), read(graph, 0, "one"),
        write(graph, 0, "two"), run(2), free(0), free(1),
    )
    schedule = Schedule(instructions, 4)
    timeline = simulate(graph, schedule, machine)
    # Written from 1 to 5 and back at 9; only then can it be written again, until 10.
    assert [(r.start_seconds, r.end_seconds) for r in timeline.lanes[1].runs] == [(9.0, 10.0)]
    assert timeline.seconds == recount_seconds(graph, schedule, machine) == 10.0


def test_each_lane_takes_its_own_share_from_computation() -> None:
    machine = several_lanes(
        lane("disk", 1.0, compute_share=0.25), lane("host", 1.0, compute_share=0.0),
    )
    graph = two_there_and_back(machine)
    for name, lost in (("disk", 1.0), ("host", 0.0)):
        schedule = Schedule((run(0), write(graph, 0, name), run(1), run(2), free(0), free(1)), 3)
        timeline = simulate(graph, schedule, machine)
        # f, g and h take 4 s; the write from 1 to 5 is waited for by the FREE at the end.
        assert timeline.done_seconds[3] == 4.0 + lost
        assert timeline.seconds == max(5.0, 4.0 + lost)


def test_copies_in_other_memories_are_counted_there_until_they_are_freed() -> None:
    graph, a, b, _ = there_and_back(1.0)
    copies = {graph.operations[write(graph, x).target].creates[0]: x for x in (a, b)}
    copy_a, copy_b = copies
    held = (run(0), write(graph, a), run(1), write(graph, b), run(2), run(3))
    tidy = (run(0), write(graph, a), run(1), free(copy_a), write(graph, b), run(2), run(3))
    assert simulate(graph, Schedule(held, 5), MACHINE).far_peak_bytes == (("disk", 6),)
    timeline = simulate(graph, Schedule(tidy, 6), MACHINE)
    assert timeline.far_peak_bytes == (("disk", 4),)
    # The copy is let go of when it is written.
    assert timeline.done_seconds[3] == 5.0
    streaming, _ = training()
    schedule = Schedule(tuple(streamed()), 5)
    assert simulate(streaming, schedule, MACHINE).far_peak_bytes == (("disk", 30),)


def test_what_rests_elsewhere_is_shared_out_between_equal_disks() -> None:
    build = GraphBuilder()
    weights = [build.buffer(size, BufferKind.PARAMETER) for size in (4, 2, 6, 8, 8)]
    x = build.operation("f0", [weights[0]], [1])[0]
    for index, weight in enumerate(weights[1:], 1):
        x = build.operation(f"f{index}", [weight, x], [1])[0]
    plain = build.finish(5, [x], [x])
    graph = with_transfers(plain, two_disks(one=1.0, two=1.0), weights)
    there = {name: [b for b, home in graph.resting.items() if graph.buffers[home].memory == name]
             for name in ("one", "two")}
    assert sorted([*there["one"], *there["two"]]) == weights
    assert all(sum(graph.buffers[b].bytes for b in found) == 14 for found in there.values())
    # Read in turn from the one and the other: neither works while the other has nothing to do.
    assert weights[-1] in there["one"] and weights[-2] in there["two"]
    # Frozen ones are never written.
    assert not any(o.mutates for o in graph.transfers)


def test_what_one_update_needs_rests_on_different_disks() -> None:
    graph, at = training()
    bare = graph.without_transfers()
    spread = with_transfers(bare, two_disks(one=1.0, two=1.0), graph.resting)
    memory = {b: spread.buffers[home].memory for b, home in spread.resting.items()}
    assert memory[at["w2"]] != memory[at["s2"]]


# Against the model of one link, and against a recount.


def sent_away(graph: StepGraph, schedule: Schedule, seed: int) -> OldSchedule:
    """Return a schedule with buffers sent away and brought back at random places."""
    draw = random.Random(seed)
    reads = [
        set(graph.operations[i.target].reads) if i.action is Action.RUN else {i.target}
        for i in schedule.instructions
    ]
    pinned = set(graph.forward_outputs)
    instructions: list[OldInstruction] = []
    live: set[int] = set()
    far: set[int] = set()
    num_forward = 0
    for position, instruction in enumerate(schedule.instructions):
        if position == schedule.num_forward:
            num_forward = len(instructions)
        missing = sorted((reads[position] & far) - live)
        instructions += [OldInstruction(one_link.FETCH, b) for b in missing]
        live |= set(missing)
        action = one_link.FREE if instruction.action is Action.FREE else one_link.COMPUTE
        instructions.append(OldInstruction(action, instruction.target, instruction.overwrite))
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
                instructions.append(OldInstruction(one_link.OFFLOAD, buffer))
                far.add(buffer)
            elif buffer in far and draw.random() < 0.3:
                instructions.append(OldInstruction(one_link.FREE, buffer))
                live.remove(buffer)
        for buffer in sorted(far - live):
            if draw.random() < 0.1:
                instructions.append(OldInstruction(one_link.FETCH, buffer))
                live.add(buffer)
    left = sorted(set(graph.outputs) - live)
    instructions += [OldInstruction(one_link.FETCH, b) for b in left]
    return OldSchedule(tuple(instructions), num_forward)


def assert_same_verdict(
    graph: StepGraph, machine: Machine, old: OldSchedule, resting: tuple[int, ...] = ()
) -> None:
    """Check that a schedule costs to the last bit what it did when there was one link."""
    extended = with_transfers(graph, machine, resting)
    verdict = judged(graph, old, machine, resting)
    timeline = simulate(extended, translated(extended, old), machine)
    assert timeline.live_bytes == verdict.live_bytes
    assert (timeline.peak_bytes, timeline.peak_index) == (verdict.peak_bytes, verdict.peak_index)
    assert set(timeline.peak_buffers) == verdict.peak_buffers
    assert timeline.done_seconds == verdict.done_seconds
    assert (timeline.seconds, timeline.lane_seconds) == (verdict.seconds, verdict.link_seconds)
    assert timeline.wait_seconds == verdict.wait_seconds


def disk(seed: int) -> Machine:
    """Return one of several disks, some with latency, some that take cores."""
    return one_lane(2e6 * (1 + seed % 3), 1e-4 * (seed % 2), 3e6, 0.2 * (seed % 4))


@pytest.mark.parametrize("name", graphs())
def test_on_one_lane_every_schedule_costs_what_it_did_on_one_link(name: str) -> None:
    graph = graphs()[name]
    for seed in range(6):
        assert_same_verdict(graph, disk(seed), sent_away(graph, plain_order(graph), seed))


def test_streaming_on_one_lane_costs_what_it_did_on_one_link() -> None:
    graph, _ = training()
    words = {WRITE: one_link.OFFLOAD, READ: one_link.FETCH}
    old = []
    for instruction in streamed():
        action, target = one_link.FREE, instruction.target
        if instruction.action is Action.RUN:
            operation = graph.operations[target]
            action = words.get(operation.kind, one_link.COMPUTE)
            if operation.kind.is_transfer:
                target = (operation.reads if operation.kind is WRITE else operation.creates)[0]
        old.append(OldInstruction(action, target))
    bare = graph.without_transfers()
    assert_same_verdict(bare, MACHINE, OldSchedule(tuple(old), 5), tuple(graph.resting))


def on_lanes(graph: StepGraph, schedule: Schedule, seed: int) -> Schedule:
    """Return a schedule with each buffer's transfers on the lanes of a memory drawn for it."""
    draw = random.Random(seed)
    memory_of: dict[int, str] = {}
    memories = sorted({b.memory for b in graph.buffers if b.memory})
    new = []
    for instruction in schedule.instructions:
        operation = graph.operations[instruction.target]
        if instruction.action is Action.FREE or not operation.lane:
            new.append(instruction)
            continue
        is_write = operation.kind is WRITE
        (buffer,) = operation.reads if is_write else operation.creates
        memory = memory_of.setdefault(buffer, draw.choice(memories))
        possible = [
            o.id for o in graph.transfers if o.kind is operation.kind
            if (o.reads if is_write else o.creates) == (buffer,)
            and graph.buffers[(o.creates if is_write else o.reads)[0]].memory == memory
        ]
        new.append(Instruction(Action.RUN, draw.choice(possible)))
    return Schedule(tuple(new), schedule.num_forward)


@pytest.mark.parametrize("name", graphs())
def test_random_transfers_cost_what_a_recount_says(name: str) -> None:
    graph = graphs()[name]
    for seed in range(6):
        host = lane("host", 4e6, 0.0, None, 0.1 * (seed % 2))
        other_way = lane("again", 3e6, 1e-4, memory="disk")
        machine = several_lanes(*disk(seed).lanes, other_way, host)
        extended = with_transfers(graph, machine)
        old = sent_away(graph, plain_order(graph), seed)
        schedule = on_lanes(extended, translated(extended, old), seed)
        timeline = simulate(extended, schedule, machine)
        assert timeline.peak_bytes == recount_peak_bytes(extended, schedule.instructions)
        recounted = recount_seconds(extended, schedule, machine)
        assert timeline.seconds == pytest.approx(recounted)
        shares = {x.name: x.compute_share for x in machine.lanes}
        copying = sum(shares[x.name] * x.busy_seconds for x in timeline.lanes)
        assert timeline.wait_seconds == pytest.approx(timeline.seconds - graph.seconds - copying)
        moved = [extended.operations[i].seconds for i in schedule.runs()
                 if extended.operations[i].lane]
        assert timeline.lane_seconds == pytest.approx(sum(moved))
        for lane_timeline in timeline.lanes:
            ends = [0.0]
            for span in lane_timeline.runs:
                assert span.start_seconds >= ends[-1]
                ends.append(span.end_seconds)
