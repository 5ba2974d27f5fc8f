"""How long a step takes after its last schedule: accumulated gradients reduced, updates."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from packlight.capture.whole_step import Consumption
from packlight.costs.profiler import CallProfiler
from packlight.moves.draft import Draft
from packlight.moves.sharding import Sharding


def finish_seconds(
    draft: Draft, trained: Iterable[nn.Parameter], profiler: CallProfiler
) -> float:
    """Return how long the update after the last schedule takes.

    Args:
        draft: the step.
        trained: the parameters that it updates.
        profiler: remembers seconds.
    """
    seconds = 0.0
    costs, reduction, sharding = draft.costs, draft.reduction, Sharding()
    if reduction is not None and draft.num_repeats > 1:
        sharding = reduction.sharding
        seconds += reduction.share_seconds
        if not reduction.sums_each:
            seconds += costs.reductions.finish_seconds(reduction, profiler)
    if draft.gradients is not Consumption.ACCUMULATE or not (costs.steps_alone or sharding):
        return seconds
    return seconds + sum(
        costs.update(p, None, profiler, sharding.num_rows(p)).seconds + _moved_seconds(p, draft)
        for p in trained
    )


def _moved_seconds(parameter: nn.Parameter, draft: Draft) -> float:
    """Return how long an update after the last schedule waits for its parameter and state."""
    if not draft.streaming:
        return 0.0
    assert draft.machine is not None
    (lane,) = (lane for lane in draft.machine.lanes if lane.memory)
    assert lane.read is not None and lane.write is not None
    sizes = [spec.num_bytes for spec in draft.streaming.of_update(parameter)]
    return sum(lane.read.seconds(size) + lane.write.seconds(size) for size in sizes)
