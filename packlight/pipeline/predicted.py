"""What a pipeline's step takes, by what its calls and messages take alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packlight.cluster.costs import StageCosts
from packlight.cluster.instructions import Work
from packlight.cluster.timeline import PipelineTimeline, simulate_pipeline
from packlight.pipeline.stage import PlannedStage
from packlight.step import Speed

if TYPE_CHECKING:
    from packlight.pipeline.step import Layout


def stage_costs(stage: PlannedStage, speed: Speed) -> StageCosts:
    """Return what a planned stage costs.

    What it recomputes on the way of its backward is part of that.

    Args:
        stage: of this rank.
        speed: of messages; a rank takes them when it needs them.
    """
    seconds = dict(zip(stage.works, stage.seconds, strict=True))
    held = stage.bytes
    message = speed.latency_seconds + held.leaving / speed.bytes_per_second
    return StageCosts(
        forward_seconds=seconds[Work.FORWARD],
        input_seconds=seconds.get(Work.INPUT, seconds.get(Work.BACKWARD, 0.0)),
        weight_seconds=seconds.get(Work.WEIGHT, 0.0),
        recompute_seconds=seconds.get(Work.RECOMPUTE, 0.0),
        kept_bytes=held.kept[0],
        held_bytes=held.kept[-1],
        receive_seconds=message,
    )


def timeline_of(layout: Layout, speed: Speed) -> PipelineTimeline:
    """Return the simulated step of one pipeline, the same on all of its ranks."""
    own = {index: stage_costs(stage, speed) for index, stage in layout.stages.items()}
    costs = {
        index: cost for of_rank in layout.ranks.gather(lambda: own)
        for index, cost in of_rank.items()
    }
    return simulate_pipeline(layout.schedule, [costs[k] for k in sorted(costs)])
