"""How to lay out a model on a cluster: degrees, microbatch, schedule, state, what each stage keeps.

All layouts are looked at in the order of their bounds (all ranks busy, nothing computed again),
until the next bound is no better than what was found. Each is cut into stages exactly
(`stages.best_stages`), with recomputation and offload chosen for each stage in its place. The best
few are simulated, and the simulation decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from packlight.cluster.candidates import (
    Candidate,
    Problem,
    bound_seconds,
    estimate,
    evenly_cut,
    least_peak_bytes,
    predicted,
)
from packlight.cluster.devices import Cluster
from packlight.cluster.training import Layout, Prediction
from packlight.cluster.transformer import Transformer
from packlight.errors import ClusterPlanError, OptionError
from packlight.units import format_bytes

# So many of the best estimates are simulated. Layouts whose estimates are so far behind the best
# are not looked at: as far as an estimate may be from its simulation.
_SIMULATED = 3
_TOLERANCE = 0.06
_MICROBATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class ClusterPlan:
    """A layout, and why it.

    Attributes:
        problem: what was to be laid out where.
        candidate: the layout with its stages.
        prediction: what the simulation says of it.
        bound_seconds: no layout that was asked for is faster.
        other: the best layout of other degrees, if there is one that fits.
        num_layouts: how many there are; most are excluded by their bounds.
        num_estimated: how many had to be planned.
    """

    problem: Problem
    candidate: Candidate
    prediction: Prediction
    bound_seconds: float
    other: tuple[Candidate, Prediction] | None = field(repr=False)
    num_layouts: int
    num_estimated: int

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.candidate.layout

    @property
    def tflops(self) -> float:
        """Of each GPU, the model's own operations: what is computed again does not count."""
        return self.prediction.flops_per_second(
            self.problem.model.flops(self.problem.batch)
        ) / 1e12


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the planner may use: by default what published runs say the predictions hold for.

    Attributes:
        max_tensor: most ranks that share a layer; 0 for those of a node.
        schedules: of "1f1b", "interleaved" and "zb-h1".
        offload: whether activations may lie in the host's memory.
        zero: levels of sharing state among data parallel ranks.
        microbatches: sizes.
    """

    max_tensor: int = 0
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb-h1")
    offload: bool = False
    zero: tuple[int, ...] = (0, 1)
    microbatches: tuple[int, ...] = _MICROBATCHES


def plan_cluster(
    model: Transformer, cluster: Cluster, batch: int, allowed: Allowed | None = None
) -> ClusterPlan:
    """Return the fastest layout of a training step.

    Args:
        model: what is trained.
        cluster: where.
        batch: samples of a step.
        allowed: what may be used; everything by default.

    Raises:
        OptionError: no layout has these numbers.
        ClusterPlanError: none fits; says which comes closest, and by how much it does not.
    """
    allowed = allowed or Allowed()
    problem = Problem(model, cluster, batch)
    layouts = sorted(
        ((bound_seconds(problem, layout), n, layout)
         for n, layout in enumerate(_layouts(problem, allowed))),
    )
    if not layouts:
        raise OptionError(_no_layout(problem))
    found, estimated = _search(problem, layouts)
    if not found:
        raise _nothing_fits(problem, [layout for _, _, layout in layouts])
    best, prediction = _judged(problem, found)
    # The best of other degrees, which the search above had no reason to look at.
    different = [each for each in layouts if _degrees(each[2]) != _degrees(best.layout)]
    others, more = _search(problem, different)
    return ClusterPlan(
        problem, best, prediction, min(layouts[0][0], prediction.seconds),
        _judged(problem, others) if others else None, len(layouts), estimated + more,
    )


def _search(
    problem: Problem, layouts: Sequence[tuple[float, int, Layout]]
) -> tuple[list[Candidate], int]:
    """Return plans of the layouts that may be best, and how many had to be planned."""
    limit = float("inf")
    for bound, _, layout in layouts:
        if bound < limit:
            limit = min(limit, evenly_cut(problem, layout))
    # What is somewhat slower is of interest, too: the simulation may see it otherwise.
    limit *= 1 + _TOLERANCE
    found: list[Candidate] = []
    for estimated, (bound, _, layout) in enumerate(layouts):
        if bound >= limit:
            return found, estimated
        candidate = estimate(problem, layout, limit)
        if candidate is not None:
            found.append(candidate)
            limit = min(limit, candidate.seconds * (1 + _TOLERANCE))
    return found, len(layouts)


def _judged(problem: Problem, found: list[Candidate]) -> tuple[Candidate, Prediction]:
    """Return the fastest of the best candidates, simulated."""
    fitting: list[tuple[Candidate, Prediction]] = []
    for candidate in sorted(found, key=lambda each: each.seconds):
        prediction = predicted(problem, candidate)
        if prediction.peak_bytes <= problem.budget_bytes:
            fitting.append((candidate, prediction))
        if len(fitting) == _SIMULATED:
            break
    assert fitting, "what was planned within the budget is within it"
    return min(fitting, key=lambda each: each[1].seconds)


def _degrees(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor, layout.pipeline, layout.data


def _layouts(problem: Problem, allowed: Allowed) -> Iterator[Layout]:
    model, num_gpus = problem.model, problem.cluster.num_gpus
    most = min(allowed.max_tensor or problem.cluster.per_node, num_gpus)
    for tensor in _divisors(num_gpus):
        if tensor > most or model.heads % tensor or problem.cluster.per_node % tensor:
            continue
        for pipeline in _divisors(num_gpus // tensor):
            data = num_gpus // (tensor * pipeline)
            if pipeline > model.layers or problem.batch % data:
                continue
            for microbatch in allowed.microbatches:
                if problem.batch // data % microbatch == 0:
                    base = Layout(
                        tensor, pipeline, data, microbatch, sequence_parallel=tensor > 1,
                        offload=allowed.offload,
                    )
                    yield from _variants(problem, allowed, base)


def _variants(problem: Problem, allowed: Allowed, base: Layout) -> Iterator[Layout]:
    """Yield the schedules and placements of state that go with degrees and a microbatch."""
    levels = allowed.zero if base.data > 1 else (0,)
    for zero in levels:
        if zero >= 2 and base.pipeline > 1:
            continue  # Gradients and weights would cross the network for each microbatch.
        layout = replace(base, zero=zero)
        if "1f1b" in allowed.schedules or base.pipeline == 1:
            yield layout
        if base.pipeline == 1 or problem.model.layers % base.pipeline:
            continue
        if "zb-h1" in allowed.schedules:
            yield replace(layout, schedule="zb-h1", offload=False)
        microbatches = base.num_microbatches(problem.batch)
        if "interleaved" in allowed.schedules and microbatches % base.pipeline == 0:
            for chunks in _divisors(problem.model.layers // base.pipeline)[1:]:
                yield replace(layout, chunks=chunks)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _no_layout(problem: Problem) -> str:
    model, cluster = problem.model, problem.cluster
    return (
        f"no tensor, pipeline and data degrees make {cluster.num_gpus} GPUs of {model.layers} "
        f"layers, {model.heads} heads and a batch of {problem.batch}\n"
        f"hint: a batch that is a multiple of {cluster.num_gpus // _shareable(problem)}"
    )


def _shareable(problem: Problem) -> int:
    """Return the most ranks that can share one sample."""
    model, cluster = problem.model, problem.cluster
    return max(
        t * p
        for t in _divisors(cluster.num_gpus)
        if t <= cluster.per_node and model.heads % t == 0
        for p in _divisors(cluster.num_gpus // t)
        if p <= model.layers
    )


def _nothing_fits(problem: Problem, layouts: list[Layout]) -> ClusterPlanError:
    """Return the error that names the layout that comes closest."""
    small = [
        layout for layout in layouts
        if layout.chunks == 1 and layout.schedule == "1f1b" and layout.microbatch == 1
    ] or layouts
    layout = min(small, key=lambda each: least_peak_bytes(problem, each))
    least = least_peak_bytes(problem, layout)
    budget = problem.budget_bytes
    cluster = problem.cluster
    return ClusterPlanError(
        f"no layout of {problem.model.parameters / 1e9:.1f}B parameters on {cluster.num_gpus} "
        f"{cluster.gpu.name} fits in {format_bytes(budget)} of each\n"
        f"  tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} comes "
        f"closest: its first stage takes {format_bytes(least)}, "
        f"{format_bytes(least - budget)} too much\n"
        f"hint: {_more_gpus(problem)}",
        least_bytes=least, budget_bytes=budget,
    )


def _more_gpus(problem: Problem) -> str:
    """Return how many more GPUs would do, if twice as many a few times over do."""
    cluster = problem.cluster
    for times in (2, 4, 8, 16, 32):
        larger = replace(problem, cluster=cluster.with_gpus(cluster.num_gpus * times))
        if any(
            estimate(larger, layout) is not None
            for layout in _layouts(larger, Allowed(schedules=("1f1b",), microbatches=(1,)))
        ):
            return f"{larger.cluster.num_gpus} of them do"
    return "a GPU with more memory, or a smaller model"
