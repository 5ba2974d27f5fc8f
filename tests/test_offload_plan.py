"""What the planner promises with transfers: joint plans, streamed parameters, honest bounds."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from packlight.errors import InfeasibleBudgetError
from packlight.planner import (
    Planner,
    lower_bound_seconds,
    pareto,
    plain_schedule,
    plan_schedule,
    smallest_plan,
)
from packlight.planner.offload import TransferRetention
from packlight.planner.placement import Placement
from packlight.planner.routes import Routes
from packlight.planner.transfers import scheduled
from packlight.step import (
    BufferKind,
    GraphBuilder,
    Machine,
    Memory,
    Phase,
    Plan,
    Reason,
    StepGraph,
    simulate,
    with_transfers,
)
from tests.oracles.gpt import gpt_step
from tests.oracles.graphs import graphs
from tests.oracles.liveness import recount_peak_bytes, recount_seconds
from tests.oracles.machines import lane, one_lane, several_lanes
from tests.oracles.transfers import fastest_seconds_with_transfers, offload_only, with_updates

NAMES = ("chain-1", "residual-2", "dag-4", "towers-0", "gpt")


@cache
def graph_of(name: str) -> StepGraph:
    return gpt_step(3) if name == "gpt" else graphs()[name]


@cache
def recomputing(name: str) -> Planner:
    return Planner(graph_of(name))


def machine_for(graph: StepGraph, share: float) -> Machine:
    """Return a machine whose lane moves the plain peak there and back in a share of the step."""
    plain_peak_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    return one_lane(2 * plain_peak_bytes / (share * graph.seconds))


def checked(graph: StepGraph, plan: Plan, machine: Machine) -> Plan:
    """Return a plan after recounting what it says about itself."""
    instructions = plan.schedule.instructions
    assert recount_peak_bytes(graph, instructions) == plan.peak_bytes
    assert plan.budget_bytes is None or plan.peak_bytes <= plan.budget_bytes
    assert recount_seconds(graph, plan.schedule, machine) == pytest.approx(plan.seconds, rel=1e-9)
    timeline = simulate(graph, plan.schedule, machine)
    assert (timeline.seconds, timeline.peak_bytes) == (plan.seconds, plan.peak_bytes)
    computed = sum(
        count * graph.operations[i].seconds for i, count in plan.schedule.run_counts().items()
        if not graph.operations[i].lane
    )
    assert plan.wait_seconds == pytest.approx(plan.seconds - computed, abs=1e-9)
    written = [o for i in plan.schedule.runs() if (o := graph.operations[i]).kind == "write"]
    assert plan.offloaded_bytes == sum(graph.buffers[o.reads[0]].bytes for o in written)
    assert plan.bound_seconds <= plan.seconds * (1 + 1e-9)
    return plan


def small_chain(seed: int, num_disks: int = 1) -> tuple[StepGraph, Machine]:
    """Return a chain of three layers and equal disks, all durations in whole seconds."""
    draw = random.Random(seed)
    build = GraphBuilder()
    values = [build.buffer(4, BufferKind.INPUT)]
    sizes, seconds = [4], []
    for index in range(3):
        sizes.append(4 * draw.randint(1, 5))
        seconds.append(float(draw.randint(1, 9)))
        values += build.operation(f"f{index}", [values[-1]], sizes[-1:], seconds=seconds[-1])
    back = {"phase": Phase.BACKWARD}
    loss = build.operation("loss", [values[-1]], [4], seconds=1.0)[0]
    gradient = build.operation("loss'", [values[-1]], sizes[-1:], seconds=1.0, **back)[0]
    for index in reversed(range(3)):
        gradient = build.operation(
            f"f{index}'", [gradient, values[index]], [sizes[index]], seconds=2 * seconds[index],
            **back,
        )[0]
    rates = draw.choice((1.0, 2.0, 4.0)), draw.choice((None, 4.0))
    names = ("disk", "other")[:num_disks]
    machine = several_lanes(*(lane(n, rates[0], 0.0, rates[1]) for n in names))
    return with_transfers(build.finish(4, [loss], [loss, gradient]), machine), machine


@pytest.mark.parametrize("seed", [0, 2, 3, 7, 9])
def test_tiny_chains_get_the_plan_that_trying_everything_finds(seed: int) -> None:
    graph, machine = small_chain(seed)
    planner = Planner(graph, machine)
    smallest_bytes = planner.smallest_plan().peak_bytes
    assert math.isinf(fastest_seconds_with_transfers(graph, smallest_bytes - 1, machine))
    for budget_bytes in (smallest_bytes, (smallest_bytes + planner.plain_peak_bytes) // 2):
        plan = checked(graph, planner.plan(budget_bytes), machine)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, machine)
        assert lower_bound_seconds(graph, budget_bytes) <= optimum
        assert plan.seconds == optimum
        assert plan.termination.reason is Reason.FEASIBLE or plan.bound_seconds == optimum


def small_training(seed: int, num_disks: int = 1) -> tuple[StepGraph, Machine]:
    """Return one layer and a head, whose parameters rest on disks and are updated."""
    draw = random.Random(seed)
    build = GraphBuilder()
    x = build.buffer(4, BufferKind.INPUT)
    w1, w2 = (build.buffer(4 * draw.randint(1, 4), BufferKind.PARAMETER) for _ in range(2))
    sizes = [b.bytes for b in build._buffers]
    a = build.operation("f", [x, w1], [8], seconds=float(draw.randint(2, 9)))[0]
    loss = build.operation("head", [a, w2], [4], seconds=float(draw.randint(2, 9)))[0]
    back, update = {"phase": Phase.BACKWARD}, {"phase": Phase.UPDATE, "can_recompute": False}
    g2, ga = build.operation("head'", [a, w2], [sizes[w2], 8], seconds=4.0, **back)
    build.operation("u2", [g2, w2], [], seconds=1.0, mutates=[w2], **update)
    g1 = build.operation("f'", [ga, x], [sizes[w1]], seconds=6.0, **back)[0]
    build.operation("u1", [g1, w1], [], seconds=1.0, mutates=[w1], **update)
    rate = draw.choice((2.0, 4.0))
    machine = several_lanes(*(lane(n, rate) for n in ("disk", "other")[:num_disks]))
    return with_transfers(build.finish(2, [loss], [loss]), machine, [w1, w2]), machine


@pytest.mark.parametrize("seed", range(4))
def test_tiny_streamed_steps_are_close_to_what_trying_everything_finds(seed: int) -> None:
    graph, machine = small_training(seed)
    planner = Planner(graph, machine)
    smallest_bytes = planner.smallest_plan().peak_bytes
    assert math.isinf(fastest_seconds_with_transfers(graph, smallest_bytes - 1, machine))
    for budget_bytes in (smallest_bytes, planner.plain_peak_bytes):
        plan = checked(graph, planner.plan(budget_bytes), machine)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, machine)
        assert plan.bound_seconds <= optimum <= plan.seconds <= 1.07 * optimum
        assert plan.termination.reason is Reason.FEASIBLE or plan.seconds == optimum


@pytest.mark.parametrize("name", NAMES)
def test_joint_plans_are_no_slower_than_recomputation_or_transfers_alone(name: str) -> None:
    without = recomputing(name)
    for share in (0.3, 1.0, 4.0):
        machine = machine_for(graph_of(name), share)
        graph = with_transfers(graph_of(name), machine)
        planner = Planner(graph, machine, without)
        assert planner.smallest_plan().peak_bytes <= without.smallest_plan().peak_bytes
        for percent in (85, 70, 55):
            budget_bytes = without.plain_peak_bytes * percent // 100
            sent_away = offload_only(graph, budget_bytes, machine)
            try:
                plan = checked(graph, planner.plan(budget_bytes), machine)
            except InfeasibleBudgetError:
                assert sent_away is None
                continue
            if sent_away is not None:
                assert plan.seconds <= simulate(graph, sent_away, machine).seconds * (1 + 1e-9)
            if without.smallest_plan().peak_bytes <= budget_bytes:
                assert plan.seconds <= without.plan(budget_bytes).seconds * (1 + 1e-9)


# Several lanes.


@pytest.mark.parametrize("seed", [0, 3])
def test_tiny_chains_with_two_disks_get_the_plan_that_trying_everything_finds(seed: int) -> None:
    graph, machine = small_chain(seed, num_disks=2)
    planner = Planner(graph, machine)
    slower = Planner(*small_chain(seed))
    smallest_bytes = planner.smallest_plan().peak_bytes
    for budget_bytes in (smallest_bytes, (smallest_bytes + planner.plain_peak_bytes) // 2):
        plan = checked(graph, planner.plan(budget_bytes), machine)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, machine)
        assert lower_bound_seconds(graph, budget_bytes) <= optimum
        assert plan.seconds == optimum <= slower.plan(budget_bytes).seconds


@pytest.mark.parametrize("seed", [1, 3])
def test_tiny_steps_streamed_from_two_disks_are_close_to_the_optimum(seed: int) -> None:
    graph, machine = small_training(seed, num_disks=2)
    planner = Planner(graph, machine)
    smallest_bytes = planner.smallest_plan().peak_bytes
    for budget_bytes in (smallest_bytes, planner.plain_peak_bytes):
        plan = checked(graph, planner.plan(budget_bytes), machine)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, machine)
        assert plan.bound_seconds <= optimum <= plan.seconds <= 1.07 * optimum


def test_a_second_disk_takes_half_of_what_a_step_waits_for() -> None:
    alone, resting = with_updates(graph_of("transformer-1"))
    rate = 2 * sum(alone.buffers[b].bytes for b in resting) / alone.seconds
    plans: list[Plan] = []
    for names in (("one",), ("one", "two")):
        machine = several_lanes(*(lane(name, rate) for name in names))
        graph = with_transfers(alone, machine, resting)
        planner = Planner(graph, machine)
        smallest_bytes = planner.smallest_plan().peak_bytes
        budget_bytes = (smallest_bytes + planner.plain_peak_bytes) // 2
        plans.append(checked(graph, planner.plan(budget_bytes), machine))
    lanes = simulate(graph, plans[1].schedule, machine).lanes
    busy = sorted(lane_timeline.busy_seconds for lane_timeline in lanes)
    assert busy[1] <= 1.2 * busy[0]
    assert plans[1].wait_seconds < 0.7 * plans[0].wait_seconds
    assert plans[1].seconds < 0.92 * plans[0].seconds


def test_offloaded_activations_are_shared_out_between_disks() -> None:
    alone = gpt_step(4)
    rate = machine_for(alone, 1.0).lanes[0].read.bytes_per_second
    two = several_lanes(lane("one", rate), lane("two", rate))
    one = machine_for(alone, 1.0)
    budget_bytes = Planner(alone).plain_peak_bytes * 45 // 100
    slow = Planner(with_transfers(alone, one), one).plan(budget_bytes)
    graph = with_transfers(alone, two)
    fast = checked(graph, Planner(graph, two).plan(budget_bytes), two)
    assert fast.seconds < slow.seconds
    assert all(timeline.runs for timeline in simulate(graph, fast.schedule, two).lanes)


def test_a_full_memory_gets_no_more_than_fits() -> None:
    """The fast disk is small: the rest goes to the slow one, or is recomputed."""
    alone = gpt_step(3)
    share = machine_for(alone, 0.5).lanes[0].read.bytes_per_second
    lanes = lane("fast", share), lane("slow", share / 4)
    roomy = several_lanes(*lanes)
    tight = Machine((Memory("fast", 8 * 2**20), Memory("slow", 24 * 2**20)), lanes)
    budget_bytes = Planner(alone).plain_peak_bytes * 55 // 100
    held = {}
    for name, machine in (("roomy", roomy), ("tight", tight)):
        graph = with_transfers(alone, machine)
        plan = checked(graph, Planner(graph, machine).plan(budget_bytes), machine)
        held[name] = dict(simulate(graph, plan.schedule, machine).far_peak_bytes)
    assert held["roomy"]["fast"] > 8 * 2**20
    assert held["tight"]["fast"] <= 8 * 2**20 and held["tight"]["slow"] <= 24 * 2**20


def test_in_the_middle_the_joint_plan_does_both_and_wins() -> None:
    alone = gpt_step(6)
    machine = machine_for(alone, 2.0)
    graph = with_transfers(alone, machine)
    planner = Planner(graph, machine)
    budget_bytes = planner.plain_peak_bytes * 45 // 100
    plan = checked(graph, planner.plan(budget_bytes), machine)
    recomputing = Planner(alone).plan(budget_bytes)
    sent_away = offload_only(graph, budget_bytes, machine)
    assert sent_away is not None
    assert plan.offloaded_bytes > 0
    assert plan.num_reruns == sum(graph.reruns(plan.schedule).values()) > 0
    assert plan.slowdown - 1 < 0.7 * (recomputing.slowdown - 1)
    assert plan.seconds < simulate(graph, sent_away, machine).seconds


def test_a_fast_lane_hides_all_transfers() -> None:
    alone = gpt_step(4)
    machine = machine_for(alone, 0.1)
    graph = with_transfers(alone, machine)
    plan = plan_schedule(graph, Planner(alone).plain_peak_bytes // 2, machine)
    assert checked(graph, plan, machine).seconds == pytest.approx(graph.seconds)
    assert plan.termination.reason is Reason.OPTIMAL
    assert plan.offloaded_bytes > 0


def test_streamed_parameters_need_less_memory_than_they_have_bytes() -> None:
    alone, resting = with_updates(gpt_step(4))
    stored_bytes = sum(alone.buffers[b].bytes for b in resting)
    machine = one_lane(4 * stored_bytes / alone.seconds)
    graph = with_transfers(alone, machine, resting)
    smallest = checked(graph, smallest_plan(graph, machine), machine)
    activations_bytes = Planner(alone).smallest_plan().peak_bytes
    assert smallest.peak_bytes < stored_bytes + activations_bytes
    # The head's gradient and AdamW's moments for it are the largest working set.
    assert smallest.peak_bytes < stored_bytes
    half = (stored_bytes + Planner(alone).plain_peak_bytes) // 2
    plan = checked(graph, plan_schedule(graph, half, machine), machine)
    assert plan.offloaded_bytes >= stored_bytes
    assert plan.bound_seconds >= graph.seconds


def test_more_memory_is_never_slower_with_streaming() -> None:
    alone, resting = with_updates(graph_of("transformer-1"))
    stored_bytes = sum(alone.buffers[b].bytes for b in resting)
    machine = one_lane(5 * stored_bytes / alone.seconds)
    graph = with_transfers(alone, machine, resting)
    plans = pareto(graph, 4, machine)
    for roomier, tighter in zip(plans, plans[1:], strict=False):
        assert checked(graph, roomier, machine).seconds <= tighter.seconds
    assert plans[-1].peak_bytes == smallest_plan(graph, machine).peak_bytes


def test_without_a_lane_plans_are_what_they_were() -> None:
    graph = graph_of("residual-2")
    budget_bytes = Planner(graph).plain_peak_bytes * 7 // 10
    bare = with_transfers(graph, Machine())
    assert Planner(bare, Machine()).plan(budget_bytes) == Planner(graph).plan(budget_bytes)


def test_the_same_question_gets_the_same_plan() -> None:
    machine = machine_for(graph_of("residual-2"), 1.5)
    graph = with_transfers(graph_of("residual-2"), machine)
    budget_bytes = Planner(graph_of("residual-2")).plain_peak_bytes * 8 // 10
    assert Planner(graph, machine).plan(budget_bytes) == Planner(graph, machine).plan(budget_bytes)


def test_transfers_need_their_machine() -> None:
    graph, _ = small_training(0)
    with pytest.raises(ValueError, match="transfers on disk needs the machine that they"):
        Planner(graph)


def test_a_budget_below_one_operation_s_needs_is_refused_with_numbers() -> None:
    graph, machine = small_training(0)
    smallest = smallest_plan(graph, machine)
    with pytest.raises(InfeasibleBudgetError) as raised:
        plan_schedule(graph, smallest.peak_bytes - 1, machine)
    assert raised.value.smallest_bytes == smallest.peak_bytes
    assert sum(size for _, size in raised.value.peak_buffers) == smallest.peak_bytes


@pytest.mark.parametrize("name", ["transformer-1", "u-shape-3"])
def test_intervals_cost_what_is_placed(name: str) -> None:
    machine = machine_for(graph_of(name), 1.0)
    graph = with_transfers(graph_of(name), machine)
    routes = Routes(graph, machine)
    moved = [b for b in routes.of if graph.buffers[b].kind is BufferKind.ACTIVATION]
    retention = TransferRetention(graph, routes, moved, 0.0)
    retention.load(range(graph.num_computations))
    retention.hold_nothing()
    placement = Placement(graph, retention.order(), routes)
    assert placement.residences
    assert int(placement.base_bytes.max()) <= retention.peak_bytes
    schedule, seconds = scheduled(placement, retention.peak_bytes, math.inf)
    timeline = simulate(graph, schedule, machine)
    assert timeline.seconds == pytest.approx(seconds, rel=1e-12)
    assert timeline.peak_bytes <= retention.peak_bytes
    assert timeline.wait_seconds > 0


def test_turns_between_the_two_ways_can_be_taken_back() -> None:
    machine = machine_for(graph_of("transformer-1"), 1.0)
    graph = with_transfers(graph_of("transformer-1"), machine)
    retention = TransferRetention(graph, Routes(graph, machine), (), 0.5)
    retention.load(range(graph.num_computations))
    retention.hold_nothing()
    before = (retention.order(), retention.peaks.tolist(), retention.total_extra_seconds)
    mark = retention.mark()
    for buffer in sorted({b for i in retention.rerun_at for b in retention.creates[i]}):
        assert retention.turn(buffer)
    assert any(entry >= graph.num_computations for entry in retention.order())
    retention.undo_to(mark)
    assert (retention.order(), retention.peaks.tolist()) == before[:2]
    assert retention.total_extra_seconds == pytest.approx(before[2])
