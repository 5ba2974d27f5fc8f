"""Captured steps as chains of layers: nothing is lost, and stages are planned from their fronts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packlight.cluster import Cluster, cluster_of
from packlight.cluster.chain import plan_chain
from packlight.cluster.measured import chain_of, layers_of_graph
from packlight.errors import ClusterPlanError, OptionError
from packlight.planner import plan_schedule
from packlight.step import BufferKind, GraphBuilder, Phase, StepGraph, StepMemory, StepProfile

BLOCKS, WIDE, NARROW, WEIGHT = 6, 400, 100, 80


def blocks() -> StepGraph:
    """Return a step of equal blocks: a wide activation, a cheap narrow one, and their backward."""
    build = GraphBuilder()
    now = build.buffer(NARROW, BufferKind.INPUT, "x")
    made = []
    for i in range(BLOCKS):
        weight = build.buffer(WEIGHT, BufferKind.PARAMETER, f"w{i}")
        (wide,) = build.operation("wide", [now, weight], [WIDE], seconds=1.0, layer=f"b{i}")
        (narrow,) = build.operation("narrow", [wide], [NARROW], seconds=0.5, layer=f"b{i}")
        made.append((now, weight, wide, narrow))
        now = narrow
    (loss,) = build.operation("loss", [now], [1], seconds=0.1)
    (gradient,) = build.operation("start", [loss], [NARROW], seconds=0.1, phase=Phase.BACKWARD)
    for i, (before, weight, wide, narrow) in reversed(list(enumerate(made))):
        inner, = build.operation(
            "narrow_b", [gradient, narrow, wide], [WIDE], seconds=0.5, phase=Phase.BACKWARD
        )
        gradient, of_weight = build.operation(
            "wide_b", [inner, before, weight], [NARROW, WEIGHT], seconds=2.0, phase=Phase.BACKWARD
        )
        build.operation(
            "update", [of_weight], [], seconds=0.05, phase=Phase.UPDATE, mutates=[weight],
            can_recompute=False, layer=f"b{i}",
        )
    return build.finish(num_forward=2 * BLOCKS + 1, forward_outputs=[loss], outputs=[loss])


@pytest.fixture(scope="module")
def profile() -> StepProfile:
    weights = BLOCKS * WEIGHT
    memory = StepMemory(weights, 0, NARROW, 2 * weights, 0, weights)
    return StepProfile(blocks(), memory, "a made-up device", "none")


def machines(memory_bytes: int, num_gpus: int = 2) -> Cluster:
    known = cluster_of("a100-80gb", num_gpus, per_node=2)
    gpu = replace(known.gpu, memory_bytes=memory_bytes, reserved_bytes=0)
    return replace(known, gpu=gpu)


def test_parts_have_all_of_a_steps_seconds_and_parameters(profile: StepProfile) -> None:
    layers = layers_of_graph(profile.graph)
    assert len(layers) >= BLOCKS
    phases = {phase: 0.0 for phase in Phase}
    for operation in profile.graph.computations:
        phases[operation.phase] += operation.seconds
    assert sum(x.forward_seconds for x in layers) == pytest.approx(phases[Phase.FORWARD])
    assert sum(x.input_seconds for x in layers) == pytest.approx(phases[Phase.BACKWARD])
    assert sum(x.parameters for x in layers) == BLOCKS * WEIGHT // 4
    chain = chain_of(profile, rows=8)
    assert chain.update_seconds == pytest.approx(phases[Phase.UPDATE])
    assert chain.static_bytes(BLOCKS * WEIGHT // 4) == 4 * BLOCKS * WEIGHT


def test_fronts_trade_what_is_kept_for_what_is_computed_again(profile: StepProfile) -> None:
    layers = layers_of_graph(profile.graph)
    fronts = [layer.choices for layer in layers if len(layer.choices) > 1]
    assert len(fronts) >= BLOCKS - 1
    for front in fronts:
        assert front[0].extra_seconds == 0.0
        for more, less in zip(front, front[1:], strict=False):
            assert more.kept_bytes > less.kept_bytes
            assert more.extra_seconds < less.extra_seconds


def test_a_stage_alone_takes_no_less_than_the_planner_of_one_device_proves(
    profile: StepProfile,
) -> None:
    chain = chain_of(profile, rows=8)
    static = 4 * BLOCKS * WEIGHT
    for budget in (1600, 2200, 3200):
        plan = plan_chain(chain, machines(static + budget, num_gpus=1), 8)
        alone = plan_schedule(profile.graph, budget + BLOCKS * WEIGHT)
        recomputed = plan.stages[0].seconds - sum(layer.seconds for layer in chain.layers)
        assert recomputed >= alone.bound_seconds - profile.graph.seconds - 1e-9
        assert plan.timeline.peak_bytes[0] <= static + budget


def test_less_memory_means_more_stages_and_then_an_error(profile: StepProfile) -> None:
    chain = chain_of(profile, rows=8)
    plenty = plan_chain(chain, machines(10**6), 64)
    assert (plenty.pipeline, plenty.data) == (1, 2)
    assert plenty.bound_seconds <= plenty.seconds
    assert plenty.others[0][:2] == (2, 1)
    little = plan_chain(chain, machines(2600), 64)
    assert little.pipeline == 2
    assert all(peak <= 2600 for peak in little.timeline.peak_bytes)
    assert little.stages[0].end == little.stages[1].start
    with pytest.raises(ClusterPlanError, match="takes .* too much\nhint: smaller microbatches"):
        plan_chain(chain, machines(1000), 64)
    with pytest.raises(OptionError, match="hint: a batch of 16"):
        plan_chain(chain, machines(10**6), 9)
