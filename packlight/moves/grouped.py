"""Which parameters are updated together in the backward, and what that costs.

Every call of an optimizer's step costs some microseconds, which is more than a bias or a norm's
weights take to be updated. Their gradients are small, too: a group of them that waits for its last
one holds few bytes meanwhile. Large parameters are updated alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from packlight.capture.joint import JointStep
from packlight.capture.whole_step import Consumer, updatable_after
from packlight.costs.profiler import CallProfiler
from packlight.updates.several import SeveralUpdates
from packlight.updates.update import ParameterUpdates

# A gradient is small if so many of them, at least, make a group.
FEWEST = 4


def grouped_updates(
    joint: JointStep,
    trained: Mapping[int, nn.Parameter],
    updates: ParameterUpdates | SeveralUpdates,
    most_bytes: int,
    profiler: CallProfiler,
) -> dict[tuple[int, ...], Consumer]:
    """Return primals that are updated by one call each -> what that costs.

    Args:
        joint: the captured step.
        trained: primal -> parameter, of those that may be grouped.
        updates: of the user's optimizer.
        most_bytes: that the gradients of a group take.
        profiler: remembers seconds.
    """
    found: dict[tuple[int, ...], Consumer] = {}
    small = {
        primal: parameter for primal, parameter in trained.items()
        if parameter.nbytes * FEWEST <= most_bytes and not updates.is_sliced(parameter)
    }
    for primals in _groups(joint, small, most_bytes):
        parameters = [trained[primal] for primal in primals]
        strides = [_stride(joint.backward_results[primal]) for primal in primals]
        cost = updates.cost_together(parameters, strides)
        forms = [
            (updates.kind(p), tuple(p.shape), p.dtype, stride)
            for p, stride in zip(parameters, strides, strict=True)
        ]
        seconds = profiler.remembered_seconds(
            f"update together {forms}", joint.device, cost.seconds
        )
        name = f"{len(primals)} parameters"
        found[primals] = Consumer(name, seconds, cost.workspace_bytes)
    return found


def _groups(
    joint: JointStep, small: Mapping[int, nn.Parameter], most_bytes: int
) -> Iterator[tuple[int, ...]]:
    """Yield groups of two parameters or more, in the order in which they can be updated."""
    after = updatable_after(joint)
    group: list[int] = []
    held_bytes = 0
    for primal in sorted(small.keys() & after.keys(), key=lambda p: (after[p], p)):
        num_bytes = small[primal].nbytes
        if group and held_bytes + num_bytes > most_bytes:
            if len(group) > 1:
                yield tuple(group)
            group, held_bytes = [], 0
        group.append(primal)
        held_bytes += num_bytes
    if len(group) > 1:
        yield tuple(group)


def _stride(result: fx.Node) -> tuple[int, ...]:
    return tuple(result.meta["val"].stride())
