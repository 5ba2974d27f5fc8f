"""Piper's, PipeDream's and FlexFlow's planning problems: optima beside all possibilities."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, product

import pytest

from packlight.cluster import Choice, Layer, cluster_of, piper
from packlight.cluster.mcmc import (
    Split,
    SplitOperation,
    bound_seconds,
    convolution_splits,
    search,
    strategy_seconds,
)
from packlight.cluster.pipedream import ChainLayer, pipedream_stages
from packlight.cluster.piper import PiperProblem, WayToRun, closed_sets, solve
from packlight.cluster.stages import Leaves, best_stages
from packlight.errors import OptionError

DIAMOND = {(0, 1): 3.0, (0, 2): 2.0, (1, 3): 1.0, (2, 3): 4.0}
CHAIN = {(0, 1): 3.0, (1, 2): 2.0, (2, 3): 1.0}


def random_problem(rng: random.Random, edges: dict[tuple[int, int], float]) -> PiperProblem:
    ways = []
    for node in range(4):
        into = {a: rng.uniform(0, 1) for a, b in edges if b == node}
        out = {b: rng.uniform(0, 1) for a, b in edges if a == node}
        by_degree = {}
        for t in (1, 2):
            seconds, held = rng.uniform(1, 3) / t, rng.uniform(2, 6) / t
            keep = WayToRun(seconds, 2.0 / t, held, 1.0, into, out, "keep")
            again = WayToRun(seconds * 1.4, 2.0 / t, held / 4, 1.5, into, out, "again")
            by_degree[t] = [keep, again]
        ways.append(by_degree)
    return PiperProblem(ways, edges, rng.choice([2, 3, 4]), rng.uniform(8, 30), 20.0, 4)


def all_orders(edges: dict[tuple[int, int], float]) -> Iterator[list[int]]:
    """Yield, for every assignment of four nodes to stages that edges allow, the stage of each."""
    for stage_of in product(range(4), repeat=4):
        used = set(stage_of)
        if used == set(range(len(used))) and all(stage_of[a] <= stage_of[b] for a, b in edges):
            yield list(stage_of)


def brute_force(problem: PiperProblem) -> float:
    """Return the least time of the slowest stage, over everything that Piper may decide."""
    best = float("inf")
    for stage_of in all_orders(dict(problem.edges)):
        count = max(stage_of) + 1
        for degrees in product([(t, d) for t in (1, 2) for d in (1, 2, 4)], repeat=count):
            if sum(t * d for t, d in degrees) > problem.num_devices:
                continue
            slowest = 0.0
            for stage, (t, d) in enumerate(degrees):
                s = sum(d for _, d in degrees[stage:])
                slowest = max(slowest, one_stage(problem, stage_of, stage, t, d, -(-s // d)))
            best = min(best, slowest)
    return best


def one_stage(
    problem: PiperProblem, stage_of: list[int], stage: int, t: int, d: int, y: int
) -> float:
    members = [node for node in range(4) if stage_of[node] == stage]
    best = float("inf")
    for picks in product(range(2), repeat=len(members)):
        ways = [problem.ways[node][t][pick] for node, pick in zip(members, picks, strict=True)]
        if sum(w.frame_bytes * y + w.fixed_bytes for w in ways) > problem.memory_bytes:
            continue
        seconds = 0.0
        for node, way in zip(members, ways, strict=True):
            crossing = sum(
                2 * (size + way.sync_in[a])
                for (a, b), size in problem.edges.items() if b == node and stage_of[a] != stage
            ) + sum(
                2 * (size + way.sync_out[b])
                for (a, b), size in problem.edges.items() if a == node and stage_of[b] != stage
            )
            resync = 4 * (d - 1) / d * way.parameter_bytes / problem.num_microbatches
            seconds += way.seconds / d + (crossing / d + resync) / problem.bytes_per_second
        best = min(best, seconds)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_pipers_optimum_is_that_of_all_stages_degrees_and_ways(seed: int) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, DIAMOND if seed % 2 else CHAIN)
    found = solve(problem)
    expected = brute_force(problem)
    if found is None:
        assert expected == float("inf")
        return
    assert max(stage.seconds for stage in found) == pytest.approx(expected)
    assert sorted(layer for stage in found for layer in stage.layers) == [0, 1, 2, 3]
    assert sum(stage.tensor * stage.data for stage in found) <= problem.num_devices


def pipers_heuristic(
    options: list[list[tuple[float, float, int]]], capacity: float
) -> tuple[float, tuple[int, ...]] | None:
    """Return what Piper picks: steps to smaller ways in the order of seconds per byte saved."""
    picks = [min(each, key=lambda o: o[1]) for each in options]
    steps = sorted(
        ((way[1] - picks[i][1]) / (picks[i][0] - way[0]), i, way)
        for i, each in enumerate(options) for way in each if way[0] < picks[i][0]
    )
    for _, i, way in steps:
        if sum(o[0] for o in picks) <= capacity:
            break
        picks[i] = way
    if sum(o[0] for o in picks) > capacity:
        return None
    return sum(o[1] for o in picks), tuple(o[2] for o in picks)


def bert(layers: int, num_devices: int) -> PiperProblem:
    """Return BERT as Piper profiled it on A100s: layers that share a mask, an embedding, a head.

    Seconds and bytes are those of a layer of its published input (bert32a100.json).
    """
    profile = {  # t: seconds kept and again, parameters, bytes of a frame, fixed bytes again
        1: (0.030492, 0.040685, 176997120, 606478336, 912500224),
        2: (0.018696, 0.024891, 88510080, 341581824, 470367488),
        4: (0.011928, 0.015604, 44266560, 208543744, 248711296),
    }
    mask, first = layers + 1, 1
    nodes = [*range(layers + 1), mask]
    edges = {(i, i + 1): 31457280.0 for i in range(layers)}
    edges |= {(mask, i): 16777216.0 for i in range(first, layers + 1)}
    ways = []
    for node in nodes:
        of_node = {}
        for t, (kept, again, parameters, frame, fixed) in profile.items():
            syncs = {} if t == 1 else dict.fromkeys(nodes, 31457280.0)
            if node == mask:
                of_node[t] = [WayToRun(0.0, 0.0, 16777216.0)]
            elif node == 0:
                of_node[t] = [WayToRun(0.001116, 200824320 / t, 1982464, 401648640 / t, {}, syncs)]
            else:
                of_node[t] = [
                    WayToRun(kept, parameters, frame, 2 * parameters, syncs, syncs, "kept"),
                    WayToRun(again, parameters, 48234496, fixed, syncs, syncs, "again"),
                ]
        ways.append(of_node)
    return PiperProblem(ways, edges, num_devices, 4.6e9, 25e9, 480)


@pytest.mark.parametrize(("layers", "num_devices"), [(6, 4), (16, 8)])
def test_bert_is_split_at_least_as_well_as_by_pipers_own_choice_of_ways(
    layers: int, num_devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = bert(layers, num_devices)
    ours = solve(problem)
    assert ours is not None
    monkeypatch.setattr(piper, "knapsack", pipers_heuristic)
    theirs = solve(problem)
    assert theirs is not None
    assert max(s.seconds for s in ours) <= max(s.seconds for s in theirs)
    assert any(1 in stage.ways for stage in ours), "some layers are computed again"
    # Even cuts on half of the devices would be this fast, if they fitted.
    assert max(s.seconds for s in ours) < sum(
        of_node[1][-1].seconds for of_node in problem.ways
    ) / (num_devices / 2)


def test_closed_sets_of_a_chain_are_its_ends_and_circles_are_refused() -> None:
    assert closed_sets(3, [(0, 1), (1, 2)]) == [0b000, 0b100, 0b110, 0b111]
    assert len(closed_sets(4, DIAMOND)) == 6
    with pytest.raises(OptionError, match="circle"):
        closed_sets(2, [(0, 1), (1, 0)])
    with pytest.raises(OptionError, match="group layers"):
        closed_sets(20, [])


def brute_pipedream(layers: list[ChainLayer], levels: list[tuple[int, float]]) -> float:
    """Return PipeDream's optimum, by trying all cuts and all numbers of replicas."""
    def one(k: int, part: list[ChainLayer], m: int) -> float:
        inner = whole(k - 1, part, levels[k - 2][0] if k > 1 else 1)
        weights = sum(layer.parameter_bytes for layer in part)
        return max(inner, 2 * (m - 1) * weights / levels[k - 1][1]) / m

    def whole(k: int, part: list[ChainLayer], m: int) -> float:
        if k == 0:
            return sum(layer.seconds for layer in part)
        best = float("inf")
        for count in range(1, min(len(part), m) + 1):
            for cuts in combinations(range(1, len(part)), count - 1):
                edges = [0, *cuts, len(part)]
                pieces = [part[a:b] for a, b in zip(edges, edges[1:], strict=False)]
                crossing = [2 * part[c - 1].output_bytes / levels[k - 1][1] for c in cuts]
                for replicas in product(range(1, m + 1), repeat=count):
                    if sum(replicas) == m:
                        times = [one(k, p, r) for p, r in zip(pieces, replicas, strict=True)]
                        best = min(best, max(times + crossing))
        return best

    return whole(len(levels), layers, levels[-1][0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [[(3, 10.0)], [(2, 50.0), (3, 5.0)]])
def test_pipedreams_optimum_is_that_of_all_cuts_and_replicas(
    seed: int, levels: list[tuple[int, float]]
) -> None:
    rng = random.Random(seed)
    layers = [
        ChainLayer(rng.uniform(0.5, 3), rng.uniform(0, 6), rng.uniform(0, 6)) for _ in range(4)
    ]
    seconds, stages = pipedream_stages(layers, levels)
    assert seconds == pytest.approx(brute_pipedream(layers, levels))
    assert [stage.start for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert sum(stage.components for stage in stages) == levels[-1][0]


@pytest.mark.parametrize("seed", range(4))
def test_three_planners_agree_where_their_problems_are_the_same(seed: int) -> None:
    """No bytes cross, memory is plenty, one device a stage: the slowest stage of a chain."""
    rng = random.Random(seed)
    times, p = [rng.uniform(0.5, 3) for _ in range(6)], 3
    ways = [{1: [WayToRun(t)]} for t in times]
    piper = solve(PiperProblem(ways, {(i, i + 1): 0.0 for i in range(5)}, p, 1e9, 1e9, 1))
    assert piper is not None
    chain = [Layer(f"{i}", 0, t, 0.0, 0.0, 0, (Choice(0),)) for i, t in enumerate(times)]
    ours = best_stages(Leaves(chain, lambda parameters: 0, 10**9), p, 10**6)
    assert ours is not None
    slowest = min(
        max(sum(times[a:b]) for a, b in zip((0, *cuts), (*cuts, 6), strict=True))
        for cuts in combinations(range(1, 6), p - 1)
    )
    assert max(stage.seconds for stage in ours) == pytest.approx(slowest)
    # A data degree of one is all that Piper may use of a batch of one.
    assert max(stage.seconds for stage in piper) == pytest.approx(sum(times))
    many = solve(PiperProblem(ways, {(i, i + 1): 0.0 for i in range(5)}, p, 1e9, 1e9, 7))
    assert many is not None
    assert max(stage.seconds for stage in many) == pytest.approx(slowest)
    # Replicas that cost nothing are PipeDream's better answer: all layers on all devices.
    free = [ChainLayer(t, 0.0, 0.0) for t in times]
    assert pipedream_stages(free, [(p, 1e9)])[0] == pytest.approx(sum(times) / p)


def random_operations(rng: random.Random, count: int) -> list[SplitOperation]:
    operations = []
    for i in range(count):
        reads = tuple(sorted(rng.sample(range(i), min(i, rng.choice([1, 2])))))
        work = rng.uniform(1, 4)
        splits = (
            Split((rng.randrange(2),), work, 0.0, "nothing"),
            Split((0, 1), work / 2, rng.uniform(0, 0.5), "samples"),
            Split((0, 1), work / 2, rng.uniform(0, 0.5), "filters"),
        )
        operations.append(SplitOperation(f"op{i}", reads, rng.uniform(0.1, 2), splits))
    return operations


@pytest.mark.parametrize("seed", range(5))
def test_sampled_strategies_come_close_to_the_best_of_all(seed: int) -> None:
    operations = random_operations(random.Random(seed), 6)
    every = search(operations, 2.0, enumerate_up_to=10**6)
    assert every.is_optimal
    assert every.bound_seconds == bound_seconds(operations) <= every.seconds
    sampled = search(operations, 2.0, num_samples=600, enumerate_up_to=0)
    assert every.seconds <= sampled.seconds <= 1.05 * every.seconds
    assert sampled == search(operations, 2.0, num_samples=600, enumerate_up_to=0)
    assert strategy_seconds(operations, sampled.picks, 2.0) == sampled.seconds


def test_a_convolution_with_few_samples_is_split_along_its_height_or_filters() -> None:
    cluster = cluster_of("a100-80gb", 8)
    one = convolution_splits(cluster, 1, (256, 256), (512, 512), 3)
    assert {split.along for split in one} == {"nothing", "height", "filters"}
    operation = SplitOperation("conv", (), 2 * 256 * 512 * 512, one)
    assert search([operation], 1e11).seconds < one[0].seconds
    many = convolution_splits(cluster, 64, (256, 256), (56, 56), 3)
    best = many[search([SplitOperation("conv", (), 0.0, many)], 1e11).picks[0]]
    assert best.along == "samples"
    assert len(best.devices) == 8
