"""What the planner promises with a link: joint plans, streamed parameters, honest bounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
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
from packlight.planner.transfers import Placement
from packlight.step import (
    Action,
    BufferKind,
    Device,
    GraphBuilder,
    Link,
    Phase,
    Plan,
    PlanStatus,
    StepGraph,
    simulate,
)
from tests.oracles.gpt import gpt_step
from tests.oracles.graphs import graphs
from tests.oracles.liveness import recount_peak_bytes, recount_seconds
from tests.oracles.transfers import fastest_seconds_with_transfers, offload_only, with_updates

NAMES = ("chain-1", "residual-2", "dag-4", "towers-0", "gpt")


def device_with(bytes_per_second: float, write_bytes_per_second: float | None = None) -> Device:
    link = Link("disk", bytes_per_second, write_bytes_per_second=write_bytes_per_second)
    return Device("some", 1 << 40, links=(link,))


@cache
def graph_of(name: str) -> StepGraph:
    return gpt_step(3) if name == "gpt" else graphs()[name]


@cache
def recomputing(name: str) -> Planner:
    return Planner(graph_of(name))


def device_of(graph: StepGraph, share: float) -> Device:
    """Return a device whose link moves the plain peak there and back in a share of the step."""
    plain_peak_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    return device_with(2 * plain_peak_bytes / (share * graph.seconds))


def checked(graph: StepGraph, plan: Plan, device: Device) -> Plan:
    """Return a plan after recounting what it says about itself."""
    instructions = plan.schedule.instructions
    assert recount_peak_bytes(graph, instructions) == plan.peak_bytes
    assert plan.budget_bytes is None or plan.peak_bytes <= plan.budget_bytes
    assert recount_seconds(graph, plan.schedule, device) == pytest.approx(plan.seconds, rel=1e-9)
    timeline = simulate(graph, plan.schedule, device)
    assert (timeline.seconds, timeline.peak_bytes) == (plan.seconds, plan.peak_bytes)
    computed = sum(
        count * graph.operations[i].seconds for i, count in plan.schedule.compute_counts().items()
    )
    assert plan.wait_seconds == pytest.approx(plan.seconds - computed, abs=1e-9)
    assert plan.offloaded_bytes == sum(
        graph.buffers[i.target].bytes for i in instructions if i.action is Action.OFFLOAD
    )
    assert plan.bound_seconds <= plan.seconds * (1 + 1e-9)
    return plan


def small_chain(seed: int) -> tuple[StepGraph, Device]:
    """Return a chain of three layers and a link, all durations in whole seconds."""
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
    graph = build.finish(4, [loss], [loss, gradient])
    return graph, device_with(draw.choice((1.0, 2.0, 4.0)), draw.choice((None, 4.0)))


@pytest.mark.parametrize("seed", [0, 2, 3, 7, 9])
def test_tiny_chains_get_the_plan_that_trying_everything_finds(seed: int) -> None:
    graph, device = small_chain(seed)
    planner = Planner(graph, device)
    smallest_bytes = planner.smallest_plan().peak_bytes
    assert math.isinf(fastest_seconds_with_transfers(graph, smallest_bytes - 1, device))
    for budget_bytes in (smallest_bytes, (smallest_bytes + planner.plain_peak_bytes) // 2):
        plan = checked(graph, planner.plan(budget_bytes), device)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, device)
        assert lower_bound_seconds(graph, budget_bytes, device) <= optimum
        assert plan.seconds == optimum
        assert plan.status is PlanStatus.FEASIBLE or plan.bound_seconds == optimum


def small_training(seed: int) -> tuple[StepGraph, Device]:
    """Return one layer and a head, both with stored parameters that the step updates."""
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
    return build.finish(2, [loss], [loss], stored=[w1, w2]), device_with(draw.choice((2.0, 4.0)))


@pytest.mark.parametrize("seed", range(4))
def test_tiny_streamed_steps_are_close_to_what_trying_everything_finds(seed: int) -> None:
    graph, device = small_training(seed)
    planner = Planner(graph, device)
    smallest_bytes = planner.smallest_plan().peak_bytes
    assert math.isinf(fastest_seconds_with_transfers(graph, smallest_bytes - 1, device))
    for budget_bytes in (smallest_bytes, planner.plain_peak_bytes):
        plan = checked(graph, planner.plan(budget_bytes), device)
        optimum = fastest_seconds_with_transfers(graph, budget_bytes, device)
        assert plan.bound_seconds <= optimum <= plan.seconds <= 1.07 * optimum
        assert plan.status is PlanStatus.FEASIBLE or plan.seconds == optimum


@pytest.mark.parametrize("name", NAMES)
def test_joint_plans_are_no_slower_than_recomputation_or_transfers_alone(name: str) -> None:
    graph, without = graph_of(name), recomputing(name)
    for share in (0.3, 1.0, 4.0):
        device = device_of(graph, share)
        planner = Planner(graph, device, without)
        assert planner.smallest_plan().peak_bytes <= without.smallest_plan().peak_bytes
        for percent in (85, 70, 55):
            budget_bytes = without.plain_peak_bytes * percent // 100
            sent_away = offload_only(graph, budget_bytes, device)
            try:
                plan = checked(graph, planner.plan(budget_bytes), device)
            except InfeasibleBudgetError:
                assert sent_away is None
                continue
            if sent_away is not None:
                assert plan.seconds <= simulate(graph, sent_away, device).seconds * (1 + 1e-9)
            if without.smallest_plan().peak_bytes <= budget_bytes:
                assert plan.seconds <= without.plan(budget_bytes).seconds * (1 + 1e-9)


def test_in_the_middle_the_joint_plan_does_both_and_wins() -> None:
    graph = gpt_step(6)
    device = device_of(graph, 2.0)
    planner = Planner(graph, device)
    budget_bytes = planner.plain_peak_bytes * 45 // 100
    plan = checked(graph, planner.plan(budget_bytes), device)
    recomputing = Planner(graph).plan(budget_bytes)
    sent_away = offload_only(graph, budget_bytes, device)
    assert sent_away is not None
    assert plan.offloaded_bytes > 0
    assert max(plan.schedule.compute_counts().values()) > 1
    assert plan.slowdown - 1 < 0.7 * (recomputing.slowdown - 1)
    assert plan.seconds < simulate(graph, sent_away, device).seconds


def test_a_fast_link_hides_all_transfers() -> None:
    graph = gpt_step(4)
    device = device_of(graph, 0.1)
    plan = plan_schedule(graph, Planner(graph).plain_peak_bytes // 2, device)
    assert checked(graph, plan, device).seconds == pytest.approx(graph.seconds)
    assert plan.status is PlanStatus.OPTIMAL
    assert plan.offloaded_bytes > 0


def test_streamed_parameters_need_less_memory_than_they_have_bytes() -> None:
    graph = with_updates(gpt_step(4))
    stored_bytes = sum(graph.buffers[b].bytes for b in graph.stored)
    device = device_with(4 * stored_bytes / graph.seconds)
    smallest = checked(graph, smallest_plan(graph, device), device)
    activations_bytes = Planner(replace(graph, stored=())).smallest_plan().peak_bytes
    assert smallest.peak_bytes < stored_bytes + activations_bytes
    # The head's gradient and AdamW's moments for it are the largest working set.
    assert smallest.peak_bytes < stored_bytes
    half = (stored_bytes + Planner(replace(graph, stored=())).plain_peak_bytes) // 2
    plan = checked(graph, plan_schedule(graph, half, device), device)
    assert plan.offloaded_bytes >= stored_bytes
    assert plan.bound_seconds >= graph.seconds


def test_more_memory_is_never_slower_with_streaming() -> None:
    graph = with_updates(graph_of("transformer-1"))
    stored_bytes = sum(graph.buffers[b].bytes for b in graph.stored)
    device = device_with(5 * stored_bytes / graph.seconds)
    plans = pareto(graph, 4, device)
    for roomier, tighter in zip(plans, plans[1:], strict=False):
        assert checked(graph, roomier, device).seconds <= tighter.seconds
    assert plans[-1].peak_bytes == smallest_plan(graph, device).peak_bytes


def test_without_a_link_plans_are_what_they_were() -> None:
    graph = graph_of("residual-2")
    budget_bytes = Planner(graph).plain_peak_bytes * 7 // 10
    for device in (None, Device("bare", 1 << 40)):
        assert Planner(graph, device).plan(budget_bytes) == Planner(graph).plan(budget_bytes)


def test_the_same_question_gets_the_same_plan() -> None:
    graph = graph_of("residual-2")
    device = device_of(graph, 1.5)
    budget_bytes = Planner(graph).plain_peak_bytes * 8 // 10
    assert Planner(graph, device).plan(budget_bytes) == Planner(graph, device).plan(budget_bytes)


def test_stored_buffers_need_a_link() -> None:
    graph, _ = small_training(0)
    with pytest.raises(ValueError, match="2 buffers are stored on a far tier"):
        Planner(graph)


def test_a_budget_below_one_operation_s_needs_is_refused_with_numbers() -> None:
    graph, device = small_training(0)
    smallest = smallest_plan(graph, device)
    with pytest.raises(InfeasibleBudgetError) as raised:
        plan_schedule(graph, smallest.peak_bytes - 1, device)
    assert raised.value.smallest_bytes == smallest.peak_bytes
    assert sum(size for _, size in raised.value.peak_buffers) == smallest.peak_bytes


@pytest.mark.parametrize("name", ["transformer-1", "u-shape-3"])
def test_intervals_cost_what_is_placed(name: str) -> None:
    graph = graph_of(name)
    device = device_of(graph, 1.0)
    moved = [b.id for b in graph.buffers if b.kind is BufferKind.ACTIVATION]
    retention = TransferRetention(graph, device.links[0], moved, 0.0)
    retention.load(range(len(graph.operations)))
    retention.hold_nothing()
    placement = Placement(graph, retention.order(), device.links[0])
    assert placement.residences
    assert int(placement.base_bytes.max()) <= retention.peak_bytes
    schedule, seconds = placement.schedule(retention.peak_bytes, math.inf)
    timeline = simulate(graph, schedule, device)
    assert timeline.seconds == pytest.approx(seconds, rel=1e-12)
    assert timeline.peak_bytes <= retention.peak_bytes
    assert timeline.wait_seconds > 0


def test_turns_between_the_two_ways_can_be_taken_back() -> None:
    graph = graph_of("transformer-1")
    device = device_of(graph, 1.0)
    retention = TransferRetention(graph, device.links[0], (), 0.5)
    retention.load(range(len(graph.operations)))
    retention.hold_nothing()
    before = (retention.order(), retention.peaks.tolist(), retention.total_extra_seconds)
    mark = retention.mark()
    for buffer in sorted({b for i in retention.rerun_at for b in retention.creates[i]}):
        assert retention.turn(buffer)
    assert any(entry < 0 for entry in retention.order())
    retention.undo_to(mark)
    assert (retention.order(), retention.peaks.tolist()) == before[:2]
    assert retention.total_extra_seconds == pytest.approx(before[2])
