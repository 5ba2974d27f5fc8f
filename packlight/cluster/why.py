"""Why a plan: what the next best one lacks, and what would have to change for it to win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from packlight.cluster.candidates import Candidate, Problem, estimate
from packlight.cluster.devices import Link
from packlight.cluster.planner import ClusterPlan
from packlight.cluster.training import Layout
from packlight.units import format_bytes, format_seconds

_FACTORS = (1.25, 1.5, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Change:
    """What would make another layout faster.

    Attributes:
        what: of the cluster changes.
        factor: to which multiple.
        seconds, other_seconds: of the plan's layout and of the other, then; infinity for one that
            no longer fits.
    """

    what: str
    factor: float
    seconds: float
    other_seconds: float

    def __str__(self) -> str:
        """Return it in words."""
        times = f"{self.factor:g}x" if self.factor > 1 else f"1/{1 / self.factor:g}"
        then = "no longer fits" if self.seconds == float("inf") else format_seconds(self.seconds)
        return f"{self.what} {times}: {then} against {format_seconds(self.other_seconds)}"


def what_would_change(plan: ClusterPlan) -> list[Change]:
    """Return the smallest changes of the cluster, one each, for which the other layout wins."""
    if plan.other is None:
        return []
    found = []
    for what, change in _changes().items():
        for factor in sorted(
            (*_FACTORS, *(1 / f for f in _FACTORS)), key=lambda f: max(f, 1 / f)
        ):
            problem = replace(plan.problem, cluster=change(plan.problem, factor).cluster)
            seconds = _seconds(problem, plan.layout)
            other = _seconds(problem, plan.other[0].layout)
            if other < seconds:
                found.append(Change(what, factor, seconds, other))
                break
    return found


def _seconds(problem: Problem, layout: Layout) -> float:
    found = estimate(problem, layout)
    return float("inf") if found is None else found.seconds


def _changes() -> dict[str, Callable[[Problem, float], Problem]]:
    def faster(link: Link, factor: float) -> Link:
        return replace(link, bytes_per_second=link.bytes_per_second * factor)

    def network(problem: Problem, factor: float) -> Problem:
        cluster = problem.cluster
        return replace(problem, cluster=replace(cluster, network=faster(cluster.network, factor)))

    def node(problem: Problem, factor: float) -> Problem:
        cluster = problem.cluster
        link = faster(cluster.node_link, factor)
        return replace(problem, cluster=replace(cluster, node_link=link))

    def memory(problem: Problem, factor: float) -> Problem:
        gpu = problem.cluster.gpu
        larger = replace(gpu, memory_bytes=int(gpu.memory_bytes * factor))
        return replace(problem, cluster=replace(problem.cluster, gpu=larger))

    return {"network": network, "links within a node": node, "memory": memory}


def reasons(plan: ClusterPlan) -> list[str]:
    """Return why this plan, in lines."""
    prediction = plan.prediction
    lines = [
        f"no layout is faster than {format_seconds(plan.bound_seconds)} "
        f"(within {prediction.seconds / plan.bound_seconds - 1:.1%}); {plan.num_layouts} layouts, "
        f"{plan.num_estimated} of them planned, the others excluded by their bounds",
    ]
    if plan.other is None:
        return [*lines, "no other degrees fit"]
    other, simulated = plan.other
    lines.append(
        f"next best: {describe_layout(other.layout)}, {format_seconds(simulated.seconds)} "
        f"({simulated.seconds / prediction.seconds - 1:+.1%}): {_difference(plan, other)}"
    )
    changes = [str(change) for change in what_would_change(plan)]
    lines.append("it would win with " + ("; ".join(changes) if changes else "none of: network, "
                 "links within a node or memory up to 8 times as fast, large, slow or small"))
    return lines


def _difference(plan: ClusterPlan, other: Candidate) -> str:
    """Return where the other layout loses its time."""
    assert plan.other is not None
    ours, theirs = plan.prediction, plan.other[1]
    ranks = len(theirs.timeline.busy_seconds), len(ours.timeline.busy_seconds)
    parts = {
        "computing": sum(theirs.timeline.busy_seconds) / ranks[0]
        - sum(ours.timeline.busy_seconds) / ranks[1],
        "messages": sum(theirs.timeline.sending_seconds) / ranks[0]
        - sum(ours.timeline.sending_seconds) / ranks[1],
        "bubble": theirs.timeline.bubble * theirs.pipeline_seconds
        - ours.timeline.bubble * ours.pipeline_seconds,
        "sums over ranks": theirs.data_seconds - ours.data_seconds,
        "update": theirs.update_seconds - ours.update_seconds,
    }
    what, seconds = max(parts.items(), key=lambda each: each[1])
    return f"{format_seconds(max(seconds, 0.0))} more in {what}"


def describe_layout(layout: Layout) -> str:
    """Return a layout in words."""
    schedule = f"{layout.schedule}, {layout.chunks} chunks" if layout.chunks > 1 else (
        layout.schedule
    )
    words = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
    words += f"microbatches of {layout.microbatch}"
    if layout.pipeline > 1:
        words += f", {schedule}"
    return words + (f", ZeRO-{layout.zero}" if layout.zero else "")


def stage_rows(plan: ClusterPlan) -> list[tuple[str, ...]]:
    """Return a row for each rank of the pipeline: layers, what they keep, seconds, frames, peak."""
    layout, timeline = plan.layout, plan.prediction.timeline
    rows: list[tuple[str, ...]] = []
    for rank in range(layout.pipeline):
        own = range(rank, layout.pipeline * layout.chunks, layout.pipeline)
        layers = [layer for stage in own for layer in plan.candidate.stages[stage]]
        kept = Counter(
            choice.name for stage in own for choice in plan.candidate.choices[stage] if choice.name
        )
        costs = [plan.prediction.stages[stage] for stage in own]
        names = Counter(layer.name for layer in layers)
        rows.append((
            str(rank),
            ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items()),
            ", ".join(f"{count} {name}" for name, count in kept.items()),
            format_seconds(sum(c.seconds for c in costs)),
            str(timeline.frames[rank]),
            format_bytes(timeline.peak_bytes[rank]),
        ))
    return rows
