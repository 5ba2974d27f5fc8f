"""What the command line says about a step, checked by hand on a step of two layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from packlight.cli import breakdown
from packlight.errors import InfeasibleBudgetError
from packlight.planner import plain_schedule, plan_whole_step, smallest_plan
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Phase,
    Schedule,
    StepGraph,
    live_after_forward,
    simulate,
)
from packlight.step.profile import StepMemory, StepProfile

FORWARD_LAYERS = ["h.0.fc", "h.0.act", "h.1.fc", "h.1.act", ""]
LAYERS = FORWARD_LAYERS + FORWARD_LAYERS[::-1]
MEMORY = StepMemory(
    parameter_bytes=100,
    state_bytes=0,
    input_bytes=7,
    optimizer_bytes=200,
    update_workspace_bytes=10,
    gradient_bytes=100,
)


def two_layers() -> StepGraph:
    """Return fc, act, fc, act, loss and their backward; every activation has 100 bytes."""
    build = GraphBuilder()
    x = build.buffer(7, BufferKind.INPUT, "x")
    a = build.operation("aten.fc.default", [x], [100], seconds=2.0)[0]
    b = build.operation("aten.act.default", [a], [100], seconds=1.0)[0]
    c = build.operation("aten.fc.default", [b], [100], seconds=2.0)[0]
    d = build.operation("aten.act.default", [c], [100], seconds=1.0)[0]
    loss = build.operation("aten.loss.default", [d], [4])[0]
    back = {"phase": Phase.BACKWARD, "seconds": 1.0}
    gd = build.operation("loss_backward", [d, loss], [100], **back)[0]
    gc = build.operation("act_backward", [gd, c], [100], **back)[0]
    gb, g1 = build.operation("fc_backward", [gc, b], [100, 50], **back)
    ga = build.operation("act_backward", [gb, a], [100], **back)[0]
    g0 = build.operation("fc_backward", [ga, x], [50], **back)[0]
    graph = build.finish(5, [loss], [loss, g0, g1])
    named = (replace(o, layer=name) for o, name in zip(graph.operations, LAYERS, strict=True))
    return replace(graph, operations=tuple(named))


def profile() -> StepProfile:
    return StepProfile(two_layers(), MEMORY, "a desk", "0")


def test_the_kinds_at_the_peak_add_up_to_it() -> None:
    peak = breakdown.peak_breakdown(profile())
    # The loss's backward: four activations and the loss are there, and the first gradient comes.
    assert (peak.activation_bytes, peak.gradient_bytes, peak.workspace_bytes) == (404, 100, 0)
    assert peak.peak_bytes == 307 + 504
    graph = two_layers()
    plain = simulate(graph, plain_schedule(graph))
    assert peak.peak_bytes == MEMORY.resident_bytes + plain.peak_bytes


def test_layers_hold_their_parameters_and_activations() -> None:
    parameters = {"h.0.fc.weight": 25, "h.1.fc.weight": 75}
    rows = breakdown.layer_rows(profile(), parameters, max_layers=3)
    assert [(r.layer, r.parameter_bytes, r.optimizer_bytes, r.activation_bytes) for r in rows] == [
        ("h.0", 25, 75, 200),
        ("h.1", 75, 225, 200),
        (breakdown.OUTSIDE, 0, 0, 4),
    ]
    deep = breakdown.layer_rows(profile(), parameters, max_layers=30)
    assert [r.layer for r in deep] == ["h.0.fc", "h.0.act", "h.1.fc", "h.1.act", breakdown.OUTSIDE]


def schedule(words: Iterable[str], num_forward: int) -> Schedule:
    """Read a schedule from words: "3" computes operation 3, "-5" frees buffer 5."""
    return Schedule(
        tuple(
            Instruction(Action.FREE if w.startswith("-") else Action.RUN, abs(int(w)))
            for w in words
        ),
        num_forward,
    )


def test_a_plan_is_told_layer_by_layer_and_equal_layers_together() -> None:
    graph = two_layers()
    forward = "0 1 -1 2 3 -3 4".split()
    backward = "5 -4 2 6 -6 -3 7 -7 -2 0 8 -8 -1 9 -10".split()
    recompute = schedule(forward + backward, len(forward))
    simulate(graph, recompute)
    assert live_after_forward(graph, recompute) == {2, 4, 5}
    rows = {row.layer: row for row in breakdown.plan_rows(graph, recompute)}
    assert set(rows) == {"h.0-1.fc", "h.0-1.act", breakdown.OUTSIDE}
    assert rows["h.0-1.fc"].recomputed == (("fc", 1),)
    assert rows["h.0-1.fc"].kept_bytes == 0 and rows["h.0-1.fc"].num_layers == 2
    assert rows["h.0-1.fc"].extra_seconds == 2.0
    assert rows["h.0-1.act"].kept == ("act",) and rows["h.0-1.act"].kept_bytes == 100
    assert rows["h.0-1.act"].recomputed == ()


def test_the_plain_step_recomputes_nothing() -> None:
    graph = two_layers()
    rows = breakdown.plan_rows(graph, plain_schedule(graph))
    assert all(row.recomputed == () for row in rows)
    assert sum(row.kept_bytes * row.num_layers for row in rows) == 404


def test_the_smallest_whole_step_budget_is_exact() -> None:
    """One byte less is refused, with that figure in whole-step bytes."""
    smallest = MEMORY.resident_bytes + smallest_plan(two_layers()).peak_bytes
    plan = plan_whole_step(two_layers(), MEMORY, smallest)
    assert MEMORY.peak_bytes(plan.peak_bytes) <= smallest
    for budget in (smallest - 1, MEMORY.resident_bytes, 1):
        with pytest.raises(InfeasibleBudgetError) as caught:
            plan_whole_step(two_layers(), MEMORY, budget)
        assert caught.value.smallest_bytes == smallest
        assert caught.value.budget_bytes == budget


def test_the_update_may_be_what_does_not_fit() -> None:
    hungry = replace(MEMORY, update_workspace_bytes=5000)
    needed = MEMORY.resident_bytes + 5000
    assert plan_whole_step(two_layers(), hungry, needed)
    with pytest.raises(InfeasibleBudgetError, match="the optimizer's update") as caught:
        plan_whole_step(two_layers(), hungry, needed - 1)
    assert caught.value.smallest_bytes == needed
    assert ("workspace", 5000) in caught.value.peak_buffers


def test_no_budget_is_the_plain_step() -> None:
    plan = plan_whole_step(two_layers(), MEMORY, None)
    assert set(plan.schedule.run_counts().values()) == {1}
