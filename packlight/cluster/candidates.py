"""One layout's best plan: its stages, what each keeps, and how long a step takes.

`estimate` is quick and for comparing thousands of layouts; `predicted` simulates. Both see the same
costs: those of `training.stage_costs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from packlight.cluster.collectives import send_seconds
from packlight.cluster.costs import Choice, Layer, StageCosts
from packlight.cluster.devices import Cluster
from packlight.cluster.modelled import receive_seconds, update_seconds
from packlight.cluster.stages import Leaves, best_stages
from packlight.cluster.training import (
    Layout,
    Prediction,
    exposed_sum_seconds,
    predict_stages,
    sharded_layers,
    stage_costs,
    static_bytes,
    tied_seconds,
)
from packlight.cluster.transformer import Recompute, Transformer


@dataclass(frozen=True)
class Candidate:
    """A layout with its stages.

    Attributes:
        layout: degrees, microbatch, schedule.
        seconds: of a step, estimated.
        bound_seconds: no step of this layout is faster, whatever it keeps and wherever it is cut.
        stages: the layers of each stage, in the order of the chain.
        choices: what each of them keeps.
    """

    layout: Layout
    seconds: float
    bound_seconds: float
    stages: tuple[tuple[Layer, ...], ...] = field(repr=False)
    choices: tuple[tuple[Choice, ...], ...] = field(repr=False)

    def costs(self, cluster: Cluster) -> list[StageCosts]:
        """Return what each stage costs."""
        return [
            stage_costs(cluster, self.layout, layers, choices)
            for layers, choices in zip(self.stages, self.choices, strict=True)
        ]


@dataclass(frozen=True)
class Problem:
    """What is to be laid out where."""

    model: Transformer
    cluster: Cluster
    batch: int

    @property
    def budget_bytes(self) -> int:
        """What tensors may take on each GPU."""
        return self.cluster.gpu.memory_bytes - self.cluster.gpu.reserved_bytes


def bound_seconds(problem: Problem, layout: Layout) -> float:
    """Return what no step of a layout undercuts, whatever is kept and wherever it is cut.

    Stage j (seconds t_j of one microbatch) cannot start before all before it have run forward, nor
    be the last to end: sum(t_i, i < j) + m t_j seconds pass. Whatever the cuts, the most of that
    over all stages is at least

        T / (1 - (1 - 1/m)^p)

    with T for all layers: the value at which all stages come to the same. Even chunks of a rank
    have m T / p, and the way to the last rank before that; with a backward in halves only its
    forward.

    Returns:
        Infinity where parameters alone do not fit.
    """
    layers = sharded_layers(problem.model, problem.cluster, layout)
    p, m = layout.pipeline, layout.num_microbatches(problem.batch)
    parameters = sum(layer.parameters for layer in layers)
    if static_bytes(layout, parameters) > p * problem.budget_bytes:
        return float("inf")
    total = sum(layer.seconds for layer in layers)
    if layout.schedule == "zb-h1":
        forward = sum(layer.forward_seconds for layer in layers[1:-1])
        return m * total / p + (p - 1) / p * forward
    if layout.chunks > 1:
        inner = sum(layer.seconds for layer in layers[1:-1])
        return m * total / p + (p - 1) / (p * layout.chunks) * inner
    return total / (1 - (1 - 1 / m) ** p)


def estimate(
    problem: Problem, layout: Layout, limit_seconds: float = float("inf")
) -> Candidate | None:
    """Return the best plan of a layout, None where nothing fits or is under the limit."""
    if layout.schedule == "zb-h1":
        found = _split_backward(problem, layout)
    elif layout.chunks > 1:
        found = _interleaved(problem, layout)
    else:
        found = _one_stage_each(problem, layout, limit_seconds)
    if layout.offload:
        # Transfers need room of their own, which may be worth more than they save.
        without = estimate(problem, replace(layout, offload=False), limit_seconds)
        if without is not None and (found is None or without.seconds <= found.seconds):
            found = without
    if found is None or found.seconds >= limit_seconds:
        return None
    return found


def evenly_cut(problem: Problem, layout: Layout) -> float:
    """Return the seconds with equal numbers of layers in each stage: quick, and rarely far off.

    Returns:
        Infinity where that does not fit, or where stages are not cut one for each rank.
    """
    if layout.chunks > 1 or layout.schedule != "1f1b":
        return float("inf")
    p, microbatches = layout.pipeline, layout.num_microbatches(problem.batch)
    leaves = _leaves(problem, layout)
    ends = [-(-(i + 1) * problem.model.layers // p) + 1 for i in range(p)]
    ends[-1] += 1
    seconds = [
        leaves.seconds(start, end, min(p - i, microbatches))
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return sum(seconds) + (microbatches - 1) * max(seconds) + _afterwards(
        problem, layout,
        [leaves.layers[start:end] for start, end in zip([0, *ends], ends, strict=False)],
    )


def predicted(problem: Problem, candidate: Candidate) -> Prediction:
    """Return what the simulation of a candidate says."""
    return predict_stages(
        problem.model, problem.cluster, candidate.layout, problem.batch,
        candidate.costs(problem.cluster),
        [sum(layer.parameters for layer in layers) for layers in candidate.stages],
    )


def least_peak_bytes(problem: Problem, layout: Layout) -> int:
    """Return the smallest peak that a layout's first stage reaches, layers cut evenly."""
    leaves = _leaves(problem, layout)
    end = -(-problem.model.layers // layout.pipeline) + 1
    frames = min(layout.pipeline, layout.num_microbatches(problem.batch))
    return leaves.least_bytes(0, min(end, len(leaves.layers)), frames)


def _leaves(
    problem: Problem, layout: Layout, layers: Sequence[Layer] | None = None
) -> Leaves:
    layers = layers or sharded_layers(problem.model, problem.cluster, layout)
    return Leaves(
        layers, lambda parameters: static_bytes(layout, parameters), problem.budget_bytes,
        _message_seconds(problem, layout),
    )


def _message_seconds(problem: Problem, layout: Layout) -> float:
    """Return what messages of one microbatch take from one stage, forward and backward."""
    if layout.pipeline == 1:
        return 0.0
    num_bytes = 2 * layout.microbatch * problem.model.sequence * problem.model.hidden
    sent = send_seconds(
        problem.cluster, num_bytes / layout.tensor, layout.tensor * layout.data
    )
    return 2 * (sent + receive_seconds(problem.cluster, num_bytes, layout.ways))


def _afterwards(
    problem: Problem, layout: Layout, stages: Sequence[Sequence[Layer]]
) -> float:
    """Return the seconds after the pipeline: sums over ranks, tied embeddings, the update."""
    ranks = [
        [layer for piece in stages[rank :: layout.pipeline] for layer in piece]
        for rank in range(layout.pipeline)
    ]
    parameters = [sum(layer.parameters for layer in rank) for rank in ranks]
    backward = [sum(x.input_seconds + x.weight_seconds for x in rank) for rank in ranks]
    sums = max(
        exposed_sum_seconds(problem.cluster, layout, count, beside)
        for count, beside in zip(parameters, backward, strict=True)
    )
    update = update_seconds(
        problem.cluster.gpu, max(parameters) / (layout.data if layout.zero else 1)
    )
    return sums + update + tied_seconds(problem.model, problem.cluster, layout)


def _one_stage_each(
    problem: Problem, layout: Layout, limit_seconds: float
) -> Candidate | None:
    microbatches = layout.num_microbatches(problem.batch)
    leaves = _leaves(problem, layout)
    found = best_stages(leaves, layout.pipeline, microbatches, limit_seconds)
    if found is None:
        return None
    pieces = tuple(tuple(leaves.layers[s.start : s.end]) for s in found)
    seconds = sum(s.seconds for s in found) + (microbatches - 1) * max(s.seconds for s in found)
    return Candidate(
        layout, seconds + _afterwards(problem, layout, pieces), bound_seconds(problem, layout),
        pieces, tuple(s.choices for s in found),
    )


def _even_pieces(layers: list[Layer], count: int) -> list[tuple[Layer, ...]]:
    """Return equal numbers of middle layers, the embedding before them, the head behind."""
    middle = layers[1:-1]
    each = len(middle) // count
    pieces = [list(middle[i * each : (i + 1) * each]) for i in range(count)]
    pieces[0].insert(0, layers[0])
    pieces[-1].append(layers[-1])
    return [tuple(piece) for piece in pieces]


def _interleaved(problem: Problem, layout: Layout) -> Candidate | None:
    """Return equal chunks, each rank choosing for all of its own."""
    p, v = layout.pipeline, layout.chunks
    microbatches = layout.num_microbatches(problem.batch)
    pieces = _even_pieces(sharded_layers(problem.model, problem.cluster, layout), p * v)
    message = _message_seconds(problem, layout)
    choices: list[tuple[Choice, ...]] = [()] * (p * v)
    most = total = 0.0
    for rank in range(p):
        # The last chunk has the fewest microbatches in flight. It keeps most: `stage` gives the
        # largest choices to the first of equal layers.
        own = [
            (layer, stage) for stage in reversed(range(rank, p * v, p)) for layer in pieces[stage]
        ]
        frames = min(microbatches * v, 2 * (p - rank - 1) + (v - 1) * p + 1)
        leaf = _leaves(problem, layout, [layer for layer, _ in own])
        stage = leaf.stage(0, len(own), frames / v)
        if stage is None:
            return None
        per_stage: dict[int, list[Choice]] = {}
        for (_, number), choice in zip(own, stage.choices, strict=True):
            per_stage.setdefault(number, []).append(choice)
        for number, chosen in per_stage.items():
            choices[number] = tuple(chosen)
        seconds = stage.seconds + (v - 1) * message
        most, total = max(most, seconds), total + seconds
    seconds = (total - total / p) / v + microbatches * most
    return Candidate(
        layout, seconds + _afterwards(problem, layout, pieces), bound_seconds(problem, layout),
        tuple(pieces), tuple(choices),
    )


def _split_backward(problem: Problem, layout: Layout) -> Candidate | None:
    """Return stages whose backward runs in halves: p frames everywhere, all layers alike."""
    p, microbatches = layout.pipeline, layout.num_microbatches(problem.batch)
    layers = sharded_layers(problem.model, problem.cluster, layout)
    pieces = _even_pieces(layers, p)
    message = _message_seconds(problem, layout)
    best: Candidate | None = None
    for recompute in (Recompute.NONE, Recompute.SELECTIVE):
        choices = tuple(
            tuple(
                next((c for c in layer.choices if c.name == recompute.value), layer.choices[0])
                for layer in piece
            )
            for piece in pieces
        )
        costs = [
            stage_costs(problem.cluster, layout, piece, each)
            for piece, each in zip(pieces, choices, strict=True)
        ]
        frames = min(p, microbatches)
        peak = max(
            c.static_bytes + c.workspace_bytes + frames * max(c.kept_bytes, c.held_bytes)
            for c in costs
        )
        if peak > problem.budget_bytes:
            continue
        slowest = max(range(p), key=lambda i: costs[i].seconds)
        others = [c for i, c in enumerate(costs) if i != slowest]
        # Gradients of weights fill what is left of the way there and back, if there are enough.
        filled = min(1.0, (microbatches - 1) / max(p - 1, 1))
        bubble = sum(
            max(c.seconds - (1 + filled) * c.weight_seconds, 0.0) + message for c in others
        )
        seconds = microbatches * (costs[slowest].seconds + message) + bubble
        seconds += _afterwards(problem, layout, pieces)
        if best is None or seconds < best.seconds:
            best = Candidate(
                layout, seconds, bound_seconds(problem, layout), tuple(pieces), choices
            )
    return best
