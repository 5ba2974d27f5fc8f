"""How a chain of measured layers is laid out: pipeline and data degrees, cuts, what stages keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from packlight.cluster.collectives import all_reduce_seconds, send_seconds
from packlight.cluster.costs import StageCosts
from packlight.cluster.devices import Cluster
from packlight.cluster.measured import Chain
from packlight.cluster.schedules import one_f_one_b
from packlight.cluster.stages import Leaves, Stage, best_stages
from packlight.cluster.timeline import PipelineTimeline, simulate_pipeline
from packlight.errors import ClusterPlanError, OptionError
from packlight.units import format_bytes

_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class ChainPlan:
    """A chain on a cluster.

    Attributes:
        pipeline, data: degrees.
        num_microbatches: that each pipeline runs.
        stages: their layers and choices.
        timeline: of one pipeline.
        seconds: of a step: the pipeline, sums of gradients over data parallel ranks, the update.
        bound_seconds: no degrees, cuts and choices are faster.
        others: (pipeline, data, seconds) of the other degrees that fit, fastest first.
    """

    pipeline: int
    data: int
    num_microbatches: int
    stages: tuple[Stage, ...]
    timeline: PipelineTimeline = field(repr=False)
    seconds: float
    bound_seconds: float
    others: tuple[tuple[int, int, float], ...]


def plan_chain(chain: Chain, cluster: Cluster, batch: int) -> ChainPlan:
    """Return the fastest layout: all degrees are simulated.

    Args:
        chain: what is trained.
        cluster: where; of the GPU only the memory counts, times are the chain's.
        batch: samples of a step.

    Raises:
        OptionError: the batch does not divide.
        ClusterPlanError: nothing fits.
    """
    budget = cluster.gpu.memory_bytes - cluster.gpu.reserved_bytes
    total = sum(layer.seconds for layer in chain.layers)
    degrees = [
        (p, cluster.num_gpus // p)
        for p in range(1, min(cluster.num_gpus, len(chain.layers)) + 1)
        if cluster.num_gpus % p == 0 and batch % (cluster.num_gpus // p * chain.rows) == 0
    ]
    if not degrees:
        raise OptionError(
            f"a batch of {batch} does not divide into microbatches of {chain.rows} on "
            f"{cluster.num_gpus} GPUs\nhint: a batch of {chain.rows * cluster.num_gpus}"
        )
    found: list[ChainPlan] = []
    for p, d in degrees:
        m = batch // (d * chain.rows)
        leaves = Leaves(chain.layers, chain.static_bytes, budget)
        stages = best_stages(leaves, p, m)
        if stages is not None:
            found.append(_simulated(chain, cluster, stages, d, m))
    bound = min(total / (1 - (1 - chain.rows * d / batch) ** p) for p, d in degrees)
    if not found:
        raise _nothing_fits(chain, degrees, budget, batch)
    found.sort(key=lambda plan: plan.seconds)
    best = found[0]
    return ChainPlan(
        best.pipeline, best.data, best.num_microbatches, best.stages, best.timeline, best.seconds,
        min(bound, best.seconds), tuple((x.pipeline, x.data, x.seconds) for x in found[1:]),
    )


def _simulated(
    chain: Chain, cluster: Cluster, stages: Sequence[Stage], data: int, num_microbatches: int
) -> ChainPlan:
    costs, sums, most = [], 0.0, 0
    for stage in stages:
        layers = chain.layers[stage.start : stage.end]
        parameters = sum(layer.parameters for layer in layers)
        costs.append(StageCosts(
            sum(layer.forward_seconds for layer in layers),
            sum(layer.input_seconds for layer in layers),
            sum(layer.weight_seconds for layer in layers),
            recompute_seconds=sum(choice.extra_seconds for choice in stage.choices),
            kept_bytes=sum(choice.kept_bytes for choice in stage.choices),
            static_bytes=chain.static_bytes(parameters),
            workspace_bytes=max(
                max(layer.workspace_bytes - choice.kept_bytes, 0)
                for layer, choice in zip(layers, stage.choices, strict=True)
            ),
            send_seconds=send_seconds(cluster, layers[-1].output_bytes, data),
            choices=tuple(choice.name for choice in stage.choices),
        ))
        sums = max(sums, all_reduce_seconds(cluster, _GRADIENT_BYTES * parameters, data))
        most = max(most, parameters)
    timeline = simulate_pipeline(one_f_one_b(len(stages), num_microbatches), costs, blocking=False)
    whole = sum(layer.parameters for layer in chain.layers)
    update = chain.update_seconds * most / max(whole, 1)
    return ChainPlan(
        len(stages), data, num_microbatches, tuple(stages), timeline,
        timeline.total_seconds + sums + update, 0.0, (),
    )


def _nothing_fits(
    chain: Chain, degrees: Sequence[tuple[int, int]], budget: int, batch: int
) -> ClusterPlanError:
    leaves = Leaves(chain.layers, chain.static_bytes, budget)
    p, d = degrees[-1]
    each = -(-len(chain.layers) // p)
    frames = min(p, batch // (d * chain.rows))
    sizes = [
        (leaves.least_bytes(start, min(start + each, len(chain.layers)),
                            max(frames - start // each, 1)), start)
        for start in range(0, len(chain.layers), each)
    ]
    least, start = max(sizes)
    return ClusterPlanError(
        f"no pipeline of up to {p} stages fits in {format_bytes(budget)} of each GPU\n"
        f"  cut evenly into {p}, the stage that begins with {chain.layers[start].name!r} takes "
        f"{format_bytes(least)}, {format_bytes(max(least - budget, 0))} too much\n"
        f"hint: smaller microbatches than {chain.rows} rows, or GPUs with more memory",
        least_bytes=least, budget_bytes=budget,
    )
