"""The MILP against exhaustive search and `simulate`: three memory models that must agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from packlight.step import BufferKind, GraphBuilder, Phase, StepGraph, simulate
from tests.oracles.checkmate import Status, fastest_schedule, smallest_peak
from tests.oracles.exhaustive import fastest_seconds
from tests.oracles.graphs import (
    heterogeneous_chain,
    random_dag,
    residual_mlp,
    u_shape,
    uniform_chain,
)
from tests.oracles.liveness import plain_order, recount_peak_bytes


def one_run_only(graph: StepGraph, operation: int) -> StepGraph:
    operations = list(graph.operations)
    operations[operation] = replace(operations[operation], can_recompute=False)
    return replace(graph, operations=tuple(operations))


def with_forward_output(graph: StepGraph, buffer: int) -> StepGraph:
    return replace(graph, forward_outputs=(*graph.forward_outputs, buffer))


SMALL = {
    "uniform": uniform_chain(5),
    "chain": heterogeneous_chain(0, length=6),
    "chain with a norm": heterogeneous_chain(3, length=4),
    "random": random_dag(2, length=4),
    "random in place": random_dag(0, length=3),
    "residual": residual_mlp(0, num_blocks=1),
    "skip": u_shape(0, depth=1),
    "one operation runs once": one_run_only(uniform_chain(5), 2),
    "logits returned": with_forward_output(
        uniform_chain(5), uniform_chain(5).operations[3].creates[0]
    ),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("place", [0.5, 0.2, 0.0])
def test_milp_is_as_fast_as_trying_everything(name: str, place: float) -> None:
    graph = SMALL[name]
    plain_bytes = simulate(graph, plain_order(graph)).peak_bytes
    smallest_bytes = smallest_peak(graph).peak_bytes
    budget_bytes = round(smallest_bytes + place * (plain_bytes - smallest_bytes))
    answer = fastest_schedule(graph, budget_bytes)
    assert answer.status is Status.OPTIMAL
    assert answer.seconds == pytest.approx(fastest_seconds(graph, budget_bytes), rel=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_nothing_fits_below_the_smallest_peak(name: str) -> None:
    graph = SMALL[name]
    smallest_bytes = smallest_peak(graph).peak_bytes
    assert fastest_schedule(graph, smallest_bytes - 1).status is Status.INFEASIBLE
    assert fastest_seconds(graph, smallest_bytes - 1) == math.inf


@pytest.mark.parametrize("name", SMALL)
def test_simulate_agrees_on_seconds_and_peak(name: str) -> None:
    graph = SMALL[name]
    smallest = smallest_peak(graph)
    assert smallest.schedule is not None
    assert simulate(graph, smallest.schedule).peak_bytes == smallest.peak_bytes
    for budget_bytes in (smallest.peak_bytes, round(1.3 * smallest.peak_bytes)):
        answer = fastest_schedule(graph, budget_bytes)
        assert answer.schedule is not None
        timeline = simulate(graph, answer.schedule)
        assert timeline.seconds == pytest.approx(answer.seconds, rel=1e-12)
        assert timeline.peak_bytes <= budget_bytes
        assert timeline.peak_bytes == recount_peak_bytes(graph, answer.schedule.instructions)


def test_hand_counted_chain() -> None:
    # Three equal stages, loss, and back. Kept: 3 activations + loss + a gradient; at the smallest
    # peak each backward operation finds its input, the gradient that comes and the one that goes.
    build = GraphBuilder()
    batch = build.buffer(10, BufferKind.INPUT)
    a = build.operation("f1", [batch], [10], seconds=1.0)[0]
    b = build.operation("f2", [a], [10], seconds=1.0)[0]
    c = build.operation("f3", [b], [10], seconds=1.0)[0]
    loss = build.operation("loss", [c], [1], seconds=1.0)[0]
    gc = build.operation("loss'", [c], [10], seconds=1.0, phase=Phase.BACKWARD)[0]
    gb = build.operation("f3'", [gc, b], [10], seconds=1.0, phase=Phase.BACKWARD)[0]
    ga = build.operation("f2'", [gb, a], [10], seconds=1.0, phase=Phase.BACKWARD)[0]
    graph = build.finish(4, [loss], [loss, ga])
    # Plain: during loss' a, b, c, gc and the loss are live.
    assert simulate(graph, plain_order(graph)).peak_bytes == 41
    smallest = smallest_peak(graph)
    # f3' reads gc and b, creates gb: 30 + loss. Nothing can go below.
    assert smallest.peak_bytes == 31
    # a is dropped after f2; f1 runs again for f2'.
    assert fastest_schedule(graph, 31).seconds == 8.0
    assert fastest_schedule(graph, 41).seconds == 7.0
    assert fastest_schedule(graph, 30).status is Status.INFEASIBLE


def test_overwriting_lowers_the_smallest_peak_by_one_buffer() -> None:
    def chain(in_place: bool) -> StepGraph:
        build = GraphBuilder()
        x = build.operation("f", [], [8], seconds=1.0)[0]
        overwrites = x if in_place else None
        y = build.operation("relu", [x], [8], seconds=1.0, overwrites_read=overwrites)[0]
        return build.finish(2, [y], [y])

    assert smallest_peak(chain(in_place=False)).peak_bytes == 16
    in_place = smallest_peak(chain(in_place=True))
    assert in_place.peak_bytes == 8
    assert in_place.schedule is not None
    assert simulate(chain(in_place=True), in_place.schedule).peak_bytes == 8
