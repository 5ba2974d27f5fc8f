"""What the planner promises, against oracles that share nothing with it."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from packlight import planner
from packlight.errors import InfeasibleBudgetError
from packlight.planner import Planner, lower_bound_seconds, plain_schedule, positions, smallest
from packlight.planner.exact import ExactSearch
from packlight.planner.facts import Facts
from packlight.planner.retention import Retention
from packlight.planner.search import LocalSearch, schedule_of
from packlight.planner.segments import backward_labels
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Limit,
    Phase,
    Plan,
    Reason,
    StepGraph,
    simulate,
    with_transfers,
)
from tests.oracles.exhaustive import fastest_seconds
from tests.oracles.graphs import random_dag, transformer, u_shape, uniform_chain
from tests.oracles.liveness import recount_peak_bytes, schedule_from_order
from tests.oracles.machines import one_lane

ROOT = Path(__file__).resolve().parent.parent


def chain(sizes: list[int], seconds: list[float], *, random_at: int = -1) -> StepGraph:
    """Return a chain whose backward operations read what their forward operations read."""
    build = GraphBuilder()
    values = [build.buffer(1, BufferKind.INPUT, "x")]
    for index, size in enumerate(sizes):
        values += build.operation(
            f"f{index}", [values[-1]], [size], seconds=seconds[index], is_random=index == random_at
        )
    loss = build.operation("loss", [values[-1]], [1], seconds=0.1)[0]
    gradient = build.operation("loss'", [values[-1]], [sizes[-1]], phase=Phase.BACKWARD)[0]
    for index in reversed(range(len(sizes))):
        size = sizes[index - 1] if index else 1
        gradient = build.operation(
            f"f{index}'", [gradient, values[index]], [size], seconds=2 * seconds[index],
            phase=Phase.BACKWARD,
        )[0]
    return build.finish(len(sizes) + 1, [loss], [loss, gradient])


@cache
def long_gpt(num_blocks: int) -> StepGraph:
    """Return a step with the shapes of a GPT: norm, wide, pointwise, narrow and a residual."""
    build = GraphBuilder()
    x = build.operation("embed", [build.buffer(8, BufferKind.INPUT)], [16], seconds=1.0)[0]
    saved: list[tuple[int, ...]] = []
    for _ in range(num_blocks):
        normed = build.operation("norm", [x], [16], seconds=0.5)[0]
        wide = build.operation("wide", [normed], [64], seconds=4.0)[0]
        bent = build.operation("gelu", [wide], [64], seconds=1.0)[0]
        narrow = build.operation("narrow", [bent], [16], seconds=4.0)[0]
        saved.append((x, normed, wide, bent))
        x = build.operation("add", [x, narrow], [16], seconds=0.2)[0]
    loss = build.operation("loss", [x], [1], seconds=1.0)[0]
    num_forward = 5 * num_blocks + 2
    back = {"phase": Phase.BACKWARD}
    gradient = build.operation("loss'", [x], [16], seconds=1.0, **back)[0]
    outputs = [loss]
    for before, normed, wide, bent in reversed(saved):
        outputs += build.operation("narrow_w", [gradient, bent], [2], seconds=4.0, **back)
        inner = build.operation("narrow'", [gradient], [64], seconds=4.0, **back)[0]
        inner = build.operation("gelu'", [inner, wide], [64], seconds=1.0, **back)[0]
        outputs += build.operation("wide_w", [inner, normed], [2], seconds=4.0, **back)
        inner = build.operation("wide'", [inner], [16], seconds=4.0, **back)[0]
        inner = build.operation("norm'", [inner, before], [16], seconds=0.5, **back)[0]
        gradient = build.operation("add'", [gradient, inner], [16], seconds=0.2, **back)[0]
    outputs += build.operation("embed'", [gradient], [4], seconds=1.0, **back)
    return build.finish(num_forward, [loss], outputs)


def per_segment_checkpointing(graph: StepGraph, num_segments: int) -> tuple[int, float]:
    """Return peak and seconds of keeping what crosses segment ends and recomputing each once.

    Written from the idea alone: before a backward operation runs, everything it needs is recomputed
    from what crosses the ends of segments, a segment at a time.
    """
    num = graph.num_forward
    segment = [min(i * num_segments // num, num_segments - 1) for i in range(num)]
    maker = {b: o.id for o in graph.operations for b in o.creates}
    crosses = {
        b for o in graph.operations[:num] for b in o.reads
        if b in maker and segment[maker[b]] < segment[o.id]
    } | set(graph.forward_outputs)
    order = list(range(num))
    present: set[int] = set()
    current = -1
    for operation in graph.operations[num:]:
        todo = [b for b in operation.reads if b in maker and maker[b] < num]
        again: set[int] = set()
        for b in todo:
            where = segment[maker[b]]
            if b not in crosses and b not in present:
                if where != current:
                    present, current = set(), where
                again |= {i for i in range(num) if segment[i] == where}
        order += [i for i in sorted(again) if not set(graph.operations[i].creates) & crosses]
        present |= {b for i in again for b in graph.operations[i].creates}
        order.append(operation.id)
    schedule = schedule_from_order(graph, order, num)
    timeline = simulate(graph, schedule)
    return timeline.peak_bytes, timeline.seconds


@pytest.mark.parametrize("sizes", [(2, 5, 2, 5), (5, 2, 2, 5), (5, 5, 2, 2), (2, 2, 5, 5)])
def test_tiny_chains_get_the_plan_that_trying_everything_finds(sizes: tuple[int, ...]) -> None:
    graph = chain(list(sizes), [1.0, 3.0, 2.0, 1.5])
    plain_peak_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    smallest_bytes = planner.smallest_plan(graph).peak_bytes
    assert fastest_seconds(graph, smallest_bytes - 1) == float("inf")
    for budget_bytes in range(smallest_bytes, plain_peak_bytes + 1):
        plan = planner.plan_schedule(graph, budget_bytes)
        assert plan.seconds == pytest.approx(fastest_seconds(graph, budget_bytes), rel=1e-9)
        assert plan.termination.reason is Reason.OPTIMAL


@pytest.mark.parametrize("seed", range(3))
def test_exact_search_and_trying_everything_agree_off_chains(seed: int) -> None:
    graph = random_dag(seed, length=2)
    search = ExactSearch(graph)
    plain_peak_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    for percent in (95, 80, 65):
        budget_bytes = plain_peak_bytes * percent // 100
        answer = search.fastest(budget_bytes, 200_000)
        assert answer.is_proven
        expected = fastest_seconds(graph, budget_bytes)
        assert graph.seconds + answer.extra_seconds == pytest.approx(expected, rel=1e-9)


def test_u_shape_plans_lie_below_every_segmentation_s_checkpointing() -> None:
    for seed in range(3):
        graph = u_shape(seed, depth=3)
        plan_of = Planner(graph)
        for num_segments in (2, 3, 4, 6):
            peak_bytes, seconds = per_segment_checkpointing(graph, num_segments)
            assert plan_of.plan(peak_bytes).seconds <= seconds * (1 + 1e-9)
            assert plan_of.smallest().peak_bytes <= peak_bytes


@pytest.mark.parametrize("num_segments", [3, 6, 12])
def test_long_gpt_plans_beat_checkpointing_per_block(num_segments: int) -> None:
    graph = long_gpt(12)
    peak_bytes, seconds = per_segment_checkpointing(graph, num_segments)
    plan = Planner(graph).plan(peak_bytes)
    assert plan.seconds < seconds


@pytest.mark.parametrize("graph", [transformer(0), long_gpt(6)], ids=["small", "large"])
def test_the_same_graph_and_budget_give_the_same_plan_whatever_was_asked_before(
    graph: StepGraph,
) -> None:
    plain_peak_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    budgets = [plain_peak_bytes * percent // 100 for percent in (85, 60, 75)]
    fresh = [Planner(replace(graph)).plan(budget_bytes) for budget_bytes in budgets]
    asked_for_less_first, asked_for_the_smallest_first = Planner(graph), Planner(graph)
    asked_for_the_smallest_first.smallest_plan()
    assert [asked_for_less_first.plan(b) for b in budgets[::-1]][::-1] == fresh
    assert [asked_for_the_smallest_first.plan(b) for b in budgets] == fresh


def test_every_process_finds_the_same_schedule() -> None:
    source = (
        "from packlight.planner import Planner; from packlight.step.serialize import to_json;"
        "from tests.test_planner import long_gpt; planner = Planner(long_gpt(6));"
        "half = planner.plain_peak_bytes // 2;"
        "print(hash('a'), to_json(planner.plan(half)), to_json(planner.smallest_plan()))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", source], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        ).stdout.split()
        for seed in ("1", "2")
    )
    assert first[0] != second[0], "strings are hashed in another way"
    assert first[1:] == second[1:]


def test_pareto_plans_are_monotone_and_end_at_the_smallest() -> None:
    graph = long_gpt(8)
    plans = planner.pareto(graph, 6)
    for roomier, tighter in itertools.pairwise(plans):
        assert roomier.peak_bytes >= tighter.peak_bytes
        assert roomier.seconds <= tighter.seconds
    assert plans[0].slowdown == 1.0
    assert plans[-1].peak_bytes == planner.smallest_plan(graph).peak_bytes


def test_a_search_says_why_it_ended_and_meets_its_bound_only_where_it_says_optimal() -> None:
    for graph, limit in ((chain([3, 5, 2, 4], [1.0, 3.0, 2.0, 1.5]), Limit.NODES),
                         (long_gpt(12), Limit.MOVES)):
        plans = planner.pareto(graph, 6)
        assert plans[0].termination.reason is Reason.OPTIMAL  # the plain step
        for plan in plans:
            ended = plan.termination
            met = plan.seconds <= plan.bound_seconds * (1 + 1e-9)
            assert met == (ended.reason is Reason.OPTIMAL) == (ended.limit is None)
            assert ended.limit in (None, limit)
            assert (str(limit) in str(ended)) == (ended.limit is limit)
    assert any(plan.termination.limit is Limit.MOVES for plan in plans)


def test_more_memory_is_never_slower() -> None:
    graph = long_gpt(8)
    plan_of = Planner(graph)
    slowest = float("inf")
    for percent in range(35, 100, 9):
        seconds = plan_of.plan(plan_of.plain_peak_bytes * percent // 100).seconds
        assert seconds <= slowest
        slowest = seconds


def test_tight_budgets_nest_recomputation() -> None:
    graph = uniform_chain(12)
    counts = planner.smallest_plan(graph).schedule.run_counts()
    assert max(counts.values()) >= 3


def test_what_must_run_once_runs_once_and_random_operations_may_run_again() -> None:
    build = GraphBuilder()
    x = build.buffer(8, BufferKind.INPUT)
    state = build.operation("rng_state", [], [1], can_recompute=False)[0]
    a = build.operation("linear", [x], [40], seconds=2.0)[0]
    dropped = build.operation("dropout", [a, state], [40], seconds=0.1, is_random=True)[0]
    b = build.operation("linear", [dropped], [40], seconds=2.0)[0]
    c = build.operation("linear", [b], [40], seconds=2.0)[0]
    loss = build.operation("loss", [c], [1], seconds=0.1)[0]
    gc = build.operation("loss'", [c], [40], phase=Phase.BACKWARD, seconds=0.1)[0]
    gb = build.operation("linear'", [gc, b], [40], phase=Phase.BACKWARD, seconds=4.0)[0]
    ga = build.operation("linear'", [gb, dropped], [40], phase=Phase.BACKWARD, seconds=4.0)[0]
    gw = build.operation("linear'", [ga, a], [4], phase=Phase.BACKWARD, seconds=4.0)[0]
    graph = build.finish(6, [loss], [loss, gw])
    plan = planner.smallest_plan(graph)
    counts = plan.schedule.run_counts()
    assert counts[0] == 1
    assert counts[2] > 1
    assert plan.peak_bytes < simulate(graph, plain_schedule(graph)).peak_bytes


def test_an_operation_in_place_saves_its_output() -> None:
    build = GraphBuilder()
    a = build.operation("linear", [build.buffer(8, BufferKind.INPUT)], [100])[0]
    b = build.operation("relu_", [a], [100], overwrites_read=a)[0]
    loss = build.operation("loss", [b], [1])[0]
    graph = build.finish(3, [loss], [loss])
    assert simulate(graph, plain_schedule(graph)).peak_bytes == 101
    plain = Planner(graph).plan(None)
    assert (plain.peak_bytes, plain.termination.reason) == (101, Reason.OPTIMAL)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_cost_what_the_simulator_says(seed: int) -> None:
    graph = transformer(seed)
    for order in (range(len(graph.operations)), LocalSearch(graph).views[0].old_ids):
        retention = Retention.from_order(graph, list(order))
        found = schedule_of(graph, retention.order())
        assert retention.peak_bytes == found.peak_bytes
        assert recount_peak_bytes(graph, found.schedule.instructions) == found.peak_bytes
    scratch = Retention.from_nothing(graph, drop_gradients=True)
    found = schedule_of(graph, scratch.order())
    assert scratch.peak_bytes >= found.peak_bytes
    assert graph.seconds + scratch.total_extra_seconds == pytest.approx(found.seconds)


def test_changes_of_intervals_can_be_taken_back() -> None:
    graph = long_gpt(4)
    retention = Retention.from_order(graph, range(len(graph.operations)))
    before = ([list(i) for i in retention.intervals], retention.peaks.tolist())
    mark = retention.mark()
    for buffer in range(5, 25):
        new = retention.without_gap(buffer, retention.num_positions // 2)
        if new is not None:
            retention.set_intervals(buffer, new)
    assert retention.total_extra_seconds > 0
    retention.undo_to(mark)
    assert ([list(i) for i in retention.intervals], retention.peaks.tolist()) == before
    assert retention.total_extra_seconds == 0


def test_the_bound_holds_for_reordered_schedules() -> None:
    graph = long_gpt(6)
    plan_of = Planner(graph)
    for percent in (80, 60, 45, 35):
        budget_bytes = plan_of.plain_peak_bytes * percent // 100
        plan = plan_of.plan(budget_bytes)
        bound = lower_bound_seconds(graph, budget_bytes)
        assert graph.seconds <= bound <= plan.seconds * (1 + 1e-9)
        assert plan.bound_seconds <= plan.seconds


def test_a_budget_too_small_is_refused_with_numbers_and_a_computed_hint() -> None:
    graph = uniform_chain(6)
    smallest = planner.smallest_plan(graph)
    with pytest.raises(InfeasibleBudgetError) as raised:
        planner.plan_schedule(graph, smallest.peak_bytes * 2 // 3)
    error = raised.value
    assert error.smallest_bytes == smallest.peak_bytes
    timeline = simulate(graph, smallest.schedule)
    at_peak = sum(size for _, size in error.peak_buffers)
    assert at_peak == timeline.peak_bytes
    assert "of the batch would need about" in str(error)


def test_every_schedule_frees_what_it_makes() -> None:
    graph = long_gpt(5)
    plan = Planner(graph).plan(simulate(graph, plain_schedule(graph)).peak_bytes // 2)
    live: set[int] = set()
    for instruction in plan.schedule.instructions:
        if instruction.action is Action.FREE:
            live.remove(instruction.target)
        else:
            live |= set(graph.operations[instruction.target].creates)
    assert live == set(graph.outputs)


def test_a_buffer_that_all_layers_read_leaves_each_layers_backward_with_its_layer() -> None:
    """Rotary positions: made at the start, read in every layer's forward and backward."""
    build = GraphBuilder()
    x = build.buffer(8, BufferKind.INPUT, "x")
    (shared,) = build.operation("positions", [x], [8])
    (y,) = build.operation("embed", [x], [8])
    num_layers = 4
    wide: list[int] = []
    cuts: list[int] = []
    num_forward = 2
    for _ in range(num_layers):
        cuts.append(num_forward)
        (scores,) = build.operation("rotate", [y, shared], [64])
        (y,) = build.operation("narrow", [scores], [8])
        (y,) = build.operation("out", [y], [8])
        # The second half of a layer's segment does not read the positions in its forward.
        cuts.append(num_forward + 2)
        wide.append(scores)
        num_forward += 3
    loss = y
    (gradient,) = build.operation("seed", [loss], [8], phase=Phase.BACKWARD)
    for scores in reversed(wide):
        (gradient,) = build.operation("turn", [gradient, shared], [8], phase=Phase.BACKWARD)
        (gradient,) = build.operation("back", [gradient, scores], [8], phase=Phase.BACKWARD)
    graph = build.finish(num_forward, [loss], [loss, gradient])
    labels = backward_labels(Facts(graph), cuts)
    backs = labels[2::2]
    # Segment 0 makes the positions; layer i's rotation is in segment 2 i + 1.
    assert backs == [2 * i + 1 for i in reversed(range(num_layers))]


def with_seconds(graph: StepGraph, seed: int) -> StepGraph:
    """Return the step as a machine would see it on which operations take something else."""
    draw = random.Random(seed)
    operations = tuple(replace(o, seconds=draw.uniform(0, 9)) for o in graph.operations)
    return replace(graph, operations=operations)


@pytest.mark.parametrize("graph", [uniform_chain(6), long_gpt(6)], ids=["small", "large"])
def test_the_smallest_budget_is_the_same_whatever_was_asked_for_and_measured(
    graph: StepGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smallest, "MAX_KEPT", 0)
    named = planner.smallest_plan(graph).peak_bytes
    assert named < simulate(graph, plain_schedule(graph)).peak_bytes
    for seed, share in enumerate((0.1, 0.3, 0.6)):
        timed = with_seconds(graph, seed)
        with pytest.raises(InfeasibleBudgetError) as raised:
            planner.plan_schedule(timed, int(share * named))
        assert raised.value.smallest_bytes == named
        plan = planner.plan_schedule(timed, named)
        assert recount_peak_bytes(graph, plan.schedule.instructions) <= named


def test_what_was_asked_before_is_not_searched_again_and_the_oldest_answers_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched, search = [], smallest._searched
    monkeypatch.setattr(smallest, "_found", {})
    monkeypatch.setattr(smallest, "_searched", lambda g: searched.append(g) or search(g))
    first, second = uniform_chain(5), uniform_chain(6)
    found = smallest.smallest_schedules(first)
    assert smallest.smallest_schedules(with_seconds(first, 1)) == found
    assert searched == [first]
    monkeypatch.setattr(smallest, "MAX_KEPT", sum(len(s.instructions) for s in found))
    smallest.smallest_schedules(second)
    assert smallest.smallest_schedules(first) == found
    assert searched == [first, second, first]


def test_plans_do_not_depend_on_what_is_remembered_of_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = one_lane(40.0)
    recomputing, moving = long_gpt(6), with_transfers(long_gpt(3), machine)

    def plans() -> list[Plan]:
        budgets = [simulate(g, plain_schedule(g)).peak_bytes for g in (recomputing, long_gpt(3))]
        return [
            planner.plan_schedule(recomputing, budgets[0] // 2),
            planner.plan_schedule(moving, budgets[1] * 3 // 5, machine),
        ]

    remembering = plans()
    assert remembering[0].num_reruns and remembering[1].offloaded_bytes
    monkeypatch.setattr(positions, "NUM_REMEMBERED", 0)
    assert plans() == remembering


def test_the_smallest_budget_is_feasible_where_the_search_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = long_gpt(6)
    named = planner.smallest_plan(graph).peak_bytes
    monkeypatch.setattr(LocalSearch, "fastest", lambda self, budget_bytes: [])
    plan = planner.plan_schedule(graph, named)
    assert simulate(graph, plan.schedule).peak_bytes == plan.peak_bytes <= named
    with pytest.raises(InfeasibleBudgetError) as raised:
        planner.plan_schedule(graph, named - 1)
    assert raised.value.smallest_bytes == named


def test_what_is_known_to_fit_is_taken_where_the_search_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = long_gpt(6)
    found = planner.smallest_plan(graph)
    budget_bytes = found.peak_bytes
    other = planner.plan_schedule(graph, 2 * budget_bytes)
    assert planner.plan_schedule(graph, budget_bytes, known=[other.schedule]) == found
    monkeypatch.setattr(LocalSearch, "fastest", lambda self, budget_bytes: [])
    monkeypatch.setattr(Planner, "smallest", lambda self: self._plain)
    known = [other.schedule, found.schedule]
    plan = planner.plan_schedule(graph, budget_bytes, known=known)
    assert (plan.schedule, plan.seconds) == (found.schedule, found.seconds)
    with pytest.raises(InfeasibleBudgetError):
        planner.plan_schedule(graph, budget_bytes - 1, known=known)


def test_a_printed_plan_is_one_line_with_its_numbers() -> None:
    graph = chain([8, 9, 10, 9, 8], [1.0] * 5)
    plan = planner.smallest_plan(graph)
    counts = plan.schedule.run_counts().values()
    again = sum(counts) - len(counts)
    assert again > 0
    assert str(plan) == (
        f"{len(graph.operations)} operations, {again} of them recomputed: {plan.peak_bytes} B of "
        f"{plan.budget_bytes} B (plain {plan.plain_peak_bytes} B), {plan.seconds:.1f} s, "
        f"{plan.seconds / graph.seconds:.3f} x plain; {plan.termination}"
    )
