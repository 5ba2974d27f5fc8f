"""Layouts of models on clusters: optimal beside all others, within budgets, with reasons."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from packlight.cluster import Cluster, Layout, Recompute, Transformer, cluster_of, predict
from packlight.cluster.candidates import Problem, bound_seconds, estimate, predicted
from packlight.cluster.costs import Choice, Layer, StageCosts
from packlight.cluster.devices import Link
from packlight.cluster.planner import Allowed, _layouts, plan_cluster
from packlight.cluster.schedules import one_f_one_b, zero_bubble_h1
from packlight.cluster.stages import Leaves, best_stages
from packlight.cluster.timeline import simulate_pipeline
from packlight.cluster.why import reasons, stage_rows, what_would_change
from packlight.errors import ClusterPlanError, OptionError

SMALL = Transformer(6, 1024, 16, sequence=512, vocabulary=8192)
DEEP = Transformer(96, 1024, 16, sequence=512, vocabulary=1024)


def random_chain(rng: random.Random, count: int) -> list[Layer]:
    layers = []
    for i in range(count):
        kept = rng.randrange(20, 60)
        choices = (Choice(kept, 0.0, "keep"), Choice(kept // 4, rng.uniform(0.1, 0.6), "again"))
        layers.append(Layer(
            f"layer{i}", rng.randrange(1, 9), *(rng.uniform(0.2, 1.0) for _ in range(3)),
            output_bytes=1, choices=choices,
        ))
    return layers


@pytest.mark.parametrize("seed", range(12))
def test_stages_are_those_of_all_cuts_and_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    layers = random_chain(rng, rng.choice([4, 5]))
    p, m = rng.choice([2, 3]), rng.choice([1, 2, 6])
    budget = rng.choice([90, 140, 220, 400])
    leaves = Leaves(layers, lambda parameters: 2 * parameters, budget)

    def cheapest(start: int, end: int, frames: int) -> float:
        part = layers[start:end]
        fits = [
            sum(x.seconds for x in part) + sum(c.extra_seconds for c in chosen)
            for chosen in product(*(x.choices for x in part))
            if 2 * sum(x.parameters for x in part) + frames * sum(c.kept_bytes for c in chosen)
            <= budget
        ]
        return min(fits, default=float("inf"))

    # The choices of different layers are a knapsack, which the leaves solve within its bound.
    for start, end in combinations(range(len(layers) + 1), 2):
        for frames in (1, 2, 3):
            stage = leaves.stage(start, end, frames)
            best = cheapest(start, end, frames)
            assert (stage is None) is (best == float("inf"))
            if stage is not None:
                assert stage.bound_seconds <= best + 1e-9 <= stage.seconds + 2e-9

    # The cuts are optimal for what the leaves say.
    every = []
    for cuts in combinations(range(1, len(layers)), p - 1):
        edges = [0, *cuts, len(layers)]
        times = [
            leaves.seconds(a, b, min(p - i, m))
            for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        ]
        every.append(sum(times) + (m - 1) * max(times))
    found = best_stages(leaves, p, m)
    if found is None:
        assert min(every) == float("inf")
        return
    seconds = [stage.seconds for stage in found]
    assert sum(seconds) + (m - 1) * max(seconds) == pytest.approx(min(every))
    assert best_stages(leaves, p, m, limit_seconds=min(every)) is None


def slowest_by_milp(layers: list[Layer], p: int, budget: int) -> float:
    """Return the least slowest stage, by an integer program over (layer, stage, choice)."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is part of the dev extra")
    keys = [
        (i, s, k) for i, layer in enumerate(layers) for s in range(p)
        for k in range(len(layer.choices))
    ]
    column = {key: n for n, key in enumerate(keys)}
    rows, low, high = [], [], []

    def constrain(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(len(keys) + 1)
        for n, value in terms.items():
            row[n] += value
        rows.append(row)
        low.append(least)
        high.append(most)

    for i in range(len(layers)):
        constrain({n: 1.0 for (j, _, _), n in column.items() if j == i}, 1, 1)
        if i:
            # The layer behind is in the same stage, or in the next.
            terms = {n: float(s) for (j, s, _), n in column.items() if j == i}
            terms |= {n: -float(s) for (j, s, _), n in column.items() if j == i - 1}
            constrain(terms, 0, 1)
    for s in range(p):
        inside = {key: n for key, n in column.items() if key[1] == s}
        constrain({n: 1.0 for n in inside.values()}, 1, np.inf)
        held = {
            n: 2.0 * layers[i].parameters + (p - s) * layers[i].choices[k].kept_bytes
            for (i, _, k), n in inside.items()
        }
        constrain(held, -np.inf, budget)
        seconds = {
            n: layers[i].seconds + layers[i].choices[k].extra_seconds
            for (i, _, k), n in inside.items()
        }
        constrain(seconds | {len(keys): -1.0}, -np.inf, 0)
    found = optimize.milp(
        np.eye(len(keys) + 1)[-1],
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        integrality=[1] * len(keys) + [0],
        bounds=optimize.Bounds(0, [1] * len(keys) + [np.inf]),
    )
    return float(found.fun) if found.status == 0 else float("inf")


@pytest.mark.parametrize("seed", range(5))
def test_slowest_stages_are_between_their_bound_and_an_integer_programs(seed: int) -> None:
    rng = random.Random(100 + seed)
    layers, p = random_chain(rng, 9), 3
    budget = rng.choice([220, 260, 320])
    leaves = Leaves(layers, lambda parameters: 2 * parameters, budget)
    found = best_stages(leaves, p, 10**6)
    proven = slowest_by_milp(layers, p, budget)
    if found is None:
        assert proven == float("inf")
        return
    slowest = max(stage.seconds for stage in found)
    assert proven <= slowest + 1e-6
    # What the leaves' greedy choice may lose is a part of one layer's recomputation.
    assert slowest <= proven + max(layer.choices[-1].extra_seconds for layer in layers)
    if all(stage.seconds == stage.bound_seconds for stage in found):
        assert slowest == pytest.approx(proven, abs=1e-6)


def test_early_stages_keep_less_since_they_hold_more_microbatches() -> None:
    layer = Layer("layer", 1, 1.0, 1.0, 1.0, 1, (Choice(10, 0.0, "keep"), Choice(1, 1.0, "again")))
    found = best_stages(Leaves([layer] * 8, lambda parameters: 0, 42), 4, 16)
    assert found is not None
    kept = [sum(choice.name == "keep" for choice in stage.choices) for stage in found]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    assert [stage.end - stage.start for stage in found] == sorted(
        stage.end - stage.start for stage in found
    )


@pytest.mark.parametrize("seed", range(6))
def test_bounds_are_below_every_cut(seed: int) -> None:
    rng = random.Random(seed)
    p, m = rng.choice([2, 3, 4]), rng.choice([1, 3, 8])
    times = [rng.uniform(0.1, 2.0) for _ in range(p)]
    total = sum(times)
    stages = [StageCosts(t / 3, t / 3, t / 3) for t in times]
    whole = simulate_pipeline(one_f_one_b(p, m), stages).total_seconds
    assert total / (1 - (1 - 1 / m) ** p) <= whole + 1e-9
    even = [StageCosts(total / p / 3, total / p / 3, total / p / 3)] * p
    halves = simulate_pipeline(zero_bubble_h1(p, m), even).total_seconds
    assert m * total / p + (p - 1) / p * total / 3 <= halves + 1e-9


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """Return eight GPUs with little memory, in two nodes."""
    known = cluster_of("a100-80gb", 8, per_node=4)
    gpu = replace(known.gpu, memory_bytes=10**9 + known.gpu.reserved_bytes)
    return replace(known, gpu=gpu)


def test_the_plan_is_the_best_of_all_layouts(cluster: Cluster) -> None:
    problem = Problem(SMALL, cluster, 32)
    allowed = Allowed(microbatches=(1, 2, 4))
    plan = plan_cluster(SMALL, cluster, 32, allowed)
    every = []
    for layout in _layouts(problem, allowed):
        candidate = estimate(problem, layout)
        if candidate is None:
            continue
        prediction = predicted(problem, candidate)
        if prediction.peak_bytes <= problem.budget_bytes:
            every.append(prediction.seconds)
            assert bound_seconds(problem, layout) <= prediction.seconds, layout
    assert len(every) > 30
    assert plan.num_estimated < plan.num_layouts
    assert plan.prediction.seconds <= min(every) * 1.01
    assert plan.bound_seconds <= plan.prediction.seconds
    assert plan.prediction.peak_bytes <= problem.budget_bytes


def test_a_plan_says_what_is_next_and_what_would_change_its_mind(cluster: Cluster) -> None:
    plan = plan_cluster(SMALL, cluster, 32)
    assert plan.other is not None
    assert plan.other[1].seconds >= plan.prediction.seconds * 0.99
    text = "\n".join(reasons(plan))
    assert "no layout is faster than" in text
    assert "next best: tensor" in text
    for change in what_would_change(plan):
        assert change.other_seconds < change.seconds
    assert len(stage_rows(plan)) == plan.layout.pipeline


def test_recomputation_and_offload_together_are_never_slower_than_either(
    cluster: Cluster,
) -> None:
    near = replace(cluster, host_link=Link(200e9, 0.9, 1e-5, compute_share=0.0))
    layout = Layout(1, 4, 2, 4, zero=1)
    only_joint, faster = [], []
    for megabytes in (3900, 4000, 4100, 4500, 9000):
        gpu = replace(cluster.gpu, memory_bytes=megabytes * 10**6 + cluster.gpu.reserved_bytes)
        problem = Problem(DEEP, replace(near, gpu=gpu), 64)
        alone = estimate(problem, layout)
        both = estimate(problem, replace(layout, offload=True))
        if alone is not None:
            assert both is not None
            assert both.seconds <= alone.seconds
            faster += [megabytes] * (both.seconds < 0.95 * alone.seconds)
        elif both is not None:
            only_joint.append(megabytes)
        if both is not None:
            assert predicted(problem, both).peak_bytes <= problem.budget_bytes
    assert only_joint, "budgets that only the two together meet"
    assert faster, "budgets at which the two together are faster"


@pytest.mark.slow
def test_the_published_layout_is_beaten_on_its_own_machines() -> None:
    model = Transformer(96, 12288, 96)
    machines = cluster_of("a100-80gb", 64)
    published = Layout(8, 8, 1, 1, 3, recompute=Recompute.SELECTIVE, sequence_parallel=True)
    theirs = predict(model, machines, published, 64)
    plan = plan_cluster(model, machines, 64)
    assert plan.prediction.seconds < theirs.seconds
    assert plan.prediction.peak_bytes < machines.gpu.memory_bytes


def test_a_model_that_does_not_fit_is_told_by_how_much_and_what_does() -> None:
    with pytest.raises(ClusterPlanError, match="too much\nhint: 8 of them do") as found:
        plan_cluster(Transformer(64, 6144, 48), cluster_of("a100-80gb", 2, per_node=2), 64)
    assert found.value.least_bytes > found.value.budget_bytes


def test_numbers_that_make_no_layout_are_refused() -> None:
    with pytest.raises(OptionError, match="a batch that is a multiple of"):
        plan_cluster(Transformer(5, 1024, 16), cluster_of("a100-80gb", 56), 3)


def test_thin_links_between_racks_keep_what_talks_most_within_one() -> None:
    flat = cluster_of("a100-80gb", 32, per_node=4)
    slow = replace(flat.network, bytes_per_second=flat.network.bytes_per_second / 200)
    racks = replace(flat, nodes_per_rack=2, rack_link=slow)
    near, far = (plan_cluster(SMALL, machines, 128) for machines in (flat, racks))
    assert far.prediction.seconds > near.prediction.seconds

    def crossing(layout: Layout) -> float:
        """Return the bytes of each rank's gradients that go from rack to rack."""
        reach = layout.tensor * (layout.data - 1) + 1
        return SMALL.parameters / layout.pipeline / layout.tensor * (reach > 8)

    assert crossing(far.layout) < crossing(near.layout)
