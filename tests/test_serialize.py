"""Graphs, schedules and plans survive JSON unchanged; damaged text is refused with a reason."""

from __future__ import annotations

import json
import random

import pytest

from packlight.errors import FormatError
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Limit,
    Phase,
    Plan,
    Reason,
    Schedule,
    StepGraph,
    Termination,
    simulate,
    with_transfers,
)
from packlight.step.digest import structure_digest
from packlight.step.serialize import VERSION, from_json, to_json
from tests.oracles.machines import lane, several_lanes


def random_graph(seed: int) -> StepGraph:
    """Return a graph with every kind of buffer, phase and flag somewhere."""
    rng = random.Random(seed)
    build = GraphBuilder()
    live = [build.buffer(rng.randrange(1, 2**40), kind, f"{kind}~\u00e9") for kind in BufferKind]
    live = live[:3]
    num_forward = rng.randrange(1, 6)
    for index in range(num_forward + rng.randrange(1, 6)):
        reads = rng.sample(live, rng.randrange(1, len(live) + 1))
        overwritten = rng.choice([None, reads[0]])
        sizes = [rng.randrange(0, 2**33) for _ in range(rng.randrange(1, 4))]
        if overwritten is not None:
            sizes[0] = build._buffers[overwritten].bytes
        live += build.operation(
            f"aten.op{index}.default",
            reads,
            sizes,
            seconds=rng.random() * 10.0 ** rng.randrange(-9, 3),
            workspace_bytes=rng.randrange(0, 1000),
            phase=Phase.FORWARD if index < num_forward else Phase.BACKWARD,
            is_random=rng.random() < 0.2,
            can_recompute=rng.random() < 0.8,
            overwrites_read=overwritten,
        )
        if index == num_forward - 1:
            loss = live[-1]
    graph = build.finish(num_forward, [loss], [loss, live[-1]])
    lanes = [lane("disk", 1e9, 1e-4), lane("host", 3e10)][: rng.randrange(3)]
    return with_transfers(graph, several_lanes(*lanes), [0] if lanes else [])


def random_plan(seed: int) -> Plan:
    """Return a plan whose instructions use every action, valid for no graph in particular."""
    rng = random.Random(seed)
    instructions = tuple(
        Instruction(rng.choice(list(Action)), rng.randrange(100), rng.choice([None, (3, 4)]))
        for _ in range(rng.randrange(0, 30))
    )
    return Plan(
        Schedule(instructions, rng.randrange(len(instructions) + 1)),
        budget_bytes=rng.choice([None, rng.randrange(1, 2**50)]),
        peak_bytes=rng.randrange(2**50),
        seconds=rng.random() / 3,
        plain_seconds=rng.random() / 7,
        plain_peak_bytes=rng.randrange(2**50),
        termination=Termination(
            rng.choice(list(Reason)), rng.random() * 1e-300, rng.choice([None, *Limit])
        ),
        allowed=rng.choice([(), ("bf16", "chunk")]),
        num_microbatches=rng.randrange(1, 9),
    )


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs_return_equal_and_cost_the_same(seed: int) -> None:
    graph = random_graph(seed)
    returned = from_json(to_json(graph))
    assert returned == graph
    assert isinstance(returned, StepGraph)
    bare = graph.without_transfers()
    compute_all = Schedule(
        tuple(Instruction(Action.RUN, op.id) for op in bare.operations), graph.num_forward
    )
    assert simulate(returned.without_transfers(), compute_all) == simulate(bare, compute_all)


@pytest.mark.parametrize("seed", range(25))
def test_random_plans_and_schedules_return_equal(seed: int) -> None:
    plan = random_plan(seed)
    assert from_json(to_json(plan)) == plan
    assert from_json(to_json(plan.schedule)) == plan.schedule


def test_floats_return_to_the_last_bit() -> None:
    for seconds in (0.1 + 0.2, 5e-324, 1.7976931348623157e308):
        plan = Plan(Schedule((), 0), None, 0, seconds, 1.0, 0, Termination(Reason.FEASIBLE, 0.0))
        returned = from_json(to_json(plan))
        assert isinstance(returned, Plan)
        assert returned.seconds.hex() == seconds.hex()


def test_text_is_the_same_for_equal_objects() -> None:
    assert to_json(random_graph(3)) == to_json(random_graph(3))


@pytest.mark.parametrize("version", [0, 1, VERSION + 1, "1", None, True])
def test_another_version_is_refused_with_both_versions_named(version: object) -> None:
    document = json.loads(to_json(random_plan(0)))
    document["version"] = version
    with pytest.raises(FormatError, match=f"version {version!r}.*reads version {VERSION}"):
        from_json(json.dumps(document))


@pytest.mark.parametrize("seed", range(3))
def test_every_truncation_is_refused(seed: int) -> None:
    text = to_json(random_graph(seed))
    for length in range(0, len(text), 7):
        with pytest.raises(FormatError):
            from_json(text[:length])


def change(text: str, path: list[str | int], value: object) -> str:
    """Return the JSON text with the entry at `path` replaced, or removed where value is ..."""
    document = json.loads(text)
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "not a Packlight file"),
        (["type"], "cluster", "unknown type 'cluster'"),
        (["surprise"], 1, "unknown fields beside the value: surprise"),
        (["value"], [], "step_graph is not an object"),
        (["value", "colour"], "red", "step_graph has unknown fields: colour"),
        (["value", "operations", 0, "speed"], 2, r"operations\[0\] has unknown fields: speed"),
        (["value", "buffers", 0, "bytes"], ..., r"buffers\[0\] lacks bytes"),
        (["value", "buffers", 0, "bytes"], -1, "buffer 0 has -1 bytes"),
        (["value", "buffers", 0, "bytes"], 1.5, r"buffers\[0\].bytes is 1.5, not int"),
        (["value", "buffers", 0, "bytes"], True, r"buffers\[0\].bytes is True, not int"),
        (["value", "buffers", 0, "kind"], "cheese", "'cheese', not one of parameter"),
        (["value", "buffers", 0, "id"], 7, "buffer at position 0 has id 7"),
        (["value", "operations", 0, "reads"], [99999], "reads .99999. too early"),
        (["value", "operations", 0, "kind"], "fly", "'fly', not one of compute"),
        (["value", "num_forward"], 99999, "num_forward is 99999 in a graph of"),
        (["value", "outputs"], [99999], "outputs .99999. are created by no operation"),
    ],
)
def test_damage_is_named_with_its_place(
    path: list[str | int], value: object, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        from_json(change(to_json(random_graph(1)), path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["operations", -1, "lane"], ..., "does not move one buffer on a lane"),
        (["operations", -1, "creates"], [99999], "moves .* buffers"),
        (["operations", -1, "kind"], "compute", "does not stand before all transfers"),
        (["operations", 0, "kind"], "read", "does not move one buffer on a lane"),
        (["operations", 0, "lane"], "disk", "reductions have a lane, computations none"),
        (["buffers", -1, "memory"], ..., "between the device and elsewhere"),
        (["buffers", 6, "memory"], "disk", "between the device and elsewhere"),
    ],
)
def test_damaged_transfers_are_named(path: list[str | int], value: object, message: str) -> None:
    graph = next(g for g in map(random_graph, range(9)) if g.transfers)
    with pytest.raises(FormatError, match=message):
        from_json(change(to_json(graph), ["value", *path], value))


def test_a_computation_that_makes_a_buffer_in_another_memory_is_refused() -> None:
    text = to_json(random_graph(1).without_transfers())
    document = json.loads(text)
    made = document["value"]["operations"][0]["creates"][0]
    with pytest.raises(FormatError, match="creates buffers in another memory"):
        from_json(change(text, ["value", "buffers", made, "memory"], "disk"))


def test_an_operation_that_creates_an_unknown_buffer_is_refused() -> None:
    document = json.loads(to_json(random_graph(1)))
    document["value"]["operations"][0]["creates"].append(99999)
    with pytest.raises(FormatError, match=r"creates buffers \[99999\] of"):
        from_json(json.dumps(document))


def test_a_pair_of_the_wrong_length_is_refused() -> None:
    plan = Plan(
        Schedule((Instruction(Action.RUN, 0, (1, 2)),), 1),
        None, 0, 1.0, 1.0, 0, Termination(Reason.OPTIMAL, 1.0),
    )
    place: list[str | int] = ["value", "schedule", "instructions", 0, "overwrite"]
    with pytest.raises(FormatError, match="not a list of 2"):
        from_json(change(to_json(plan), place, [1, 2, 3]))


def test_a_digest_knows_which_lanes_there_are_and_neither_their_names_nor_their_speed() -> None:
    graph = random_graph(1).without_transfers()
    here, there, nowhere = (
        structure_digest(with_transfers(graph, several_lanes(*lanes)))
        for lanes in ([lane("/mnt/a", 1e9)], [lane("/mnt/b", 2e9, 1e-4)], [])
    )
    assert here == there != nowhere
    two = with_transfers(graph, several_lanes(lane("one", 1e9), lane("two", 1e9)))
    assert structure_digest(two) not in (here, nowhere)


NOT_OURS = ["", "null", "[]", "3", "{}", "NaN", b"\xff\xfe\xfa", "[" * 100_000]


@pytest.mark.parametrize("text", NOT_OURS, ids=lambda text: repr(text[:6]))
def test_text_that_is_not_ours_is_refused(text: str | bytes) -> None:
    with pytest.raises(FormatError):
        from_json(text)


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot write a dict"):
        to_json({})  # type: ignore[arg-type]
    plan = Plan(Schedule((), 0), None, 0, float("inf"), 1.0, 0, Termination(Reason.FEASIBLE, 0.0))
    with pytest.raises(FormatError, match="not finite"):
        to_json(plan)
