"""What the parts of a model cost on one rank: seconds, bytes, and the ways to keep less.

`Layer` is all that partitioning, schedules and the planner know of a model. Its choices are the
Pareto front of what it keeps of a microbatch against the seconds that this costs in the backward:
from formulas (`modelled.py`), or from plans of a captured graph (`measured.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to keep a layer's activations.

    Attributes:
        kept_bytes: of each microbatch, from its forward to its backward.
        extra_seconds: what that adds to the backward: computing again, waiting for transfers.
        name: for reports.
    """

    kept_bytes: int
    extra_seconds: float = 0.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A part of a model that is not cut, as one rank runs it on one microbatch.

    Attributes:
        name: for reports; equal layers have equal names.
        parameters: elements on the rank.
        forward_seconds: of one microbatch.
        input_seconds, weight_seconds: of the backward, up to gradients of its input and of its
            parameters.
        output_bytes: what it hands to the layer behind it.
        choices: ways to keep its activations, from the most bytes to the fewest.
        workspace_bytes: what it needs besides, while its backward runs.
        held_bytes: what gradients of its weights still need once that of its input is made.
    """

    name: str
    parameters: int
    forward_seconds: float
    input_seconds: float
    weight_seconds: float
    output_bytes: int
    choices: tuple[Choice, ...]
    workspace_bytes: int = 0
    held_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of forward and backward, nothing computed again."""
        return self.forward_seconds + self.input_seconds + self.weight_seconds


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Layers that run together on one rank, with a choice for each: what a schedule needs to know.

    Attributes:
        forward_seconds, input_seconds, weight_seconds: of one microbatch.
        recompute_seconds: what choices add to the backward.
        kept_bytes: of each microbatch in flight.
        static_bytes: parameters, gradients, optimizer state.
        workspace_bytes: beside what is kept, while one of its layers runs its backward.
        held_bytes: of each microbatch, between the halves of a backward that is split.
        version_bytes: of a further version of its parameters.
        update_seconds: of the optimizer's step.
        send_seconds: of its output, to the next stage (and of its gradient, back).
        receive_seconds: of the receiving ranks' own exchange of what has come.
        choices: the names, in the order of the layers.
    """

    forward_seconds: float
    input_seconds: float
    weight_seconds: float
    recompute_seconds: float = 0.0
    kept_bytes: int = 0
    static_bytes: int = 0
    workspace_bytes: int = 0
    held_bytes: int = 0
    version_bytes: int = 0
    update_seconds: float = 0.0
    send_seconds: float = 0.0
    receive_seconds: float = 0.0
    choices: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of one microbatch, forward and backward."""
        return (
            self.forward_seconds + self.input_seconds + self.weight_seconds
            + self.recompute_seconds
        )


def pareto(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Return those that no other beats in bytes and seconds, from the most bytes to the fewest."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.kept_bytes, c.extra_seconds)):
        if not front or choice.extra_seconds < front[-1].extra_seconds:
            front.append(choice)
    return tuple(reversed(front))


@dataclass(frozen=True, slots=True)
class Kept:
    """What `cheapest_within` found.

    Attributes:
        extra_seconds: what the choices add to one microbatch.
        kept_bytes: of each microbatch.
        counts: for each group, how many of its layers take each choice of its convex front.
        bound_seconds: no choices that fit add less.
    """

    extra_seconds: float
    kept_bytes: int
    counts: tuple[tuple[int, ...], ...]
    bound_seconds: float


def cheapest_within(
    groups: Sequence[tuple[tuple[Choice, ...], int]], num_bytes: float
) -> Kept | None:
    """Return the fastest choices for all layers that keep at most `num_bytes` of a microbatch.

    The steps down the layers' convex fronts are taken in the order of seconds per byte saved. Up to
    the last step that is the optimum of the relaxation in which a layer may be part one choice,
    part another, which is the bound; in the last step's place stands whatever step saves enough at
    the least price.

    Args:
        groups: (convex front, number of layers that have it), see `convex`.
        num_bytes: what all of them may keep together.

    Returns:
        None if even the smallest choices keep more.
    """
    counts = [[count, *[0] * (len(front) - 1)] for front, count in groups]
    kept = sum(front[0].kept_bytes * count for front, count in groups)
    extra = sum(front[0].extra_seconds * count for front, count in groups)
    steps = sorted(
        ((after.extra_seconds - before.extra_seconds) / (before.kept_bytes - after.kept_bytes),
         group, i)
        for group, (front, _) in enumerate(groups)
        for i, (before, after) in enumerate(zip(front, front[1:], strict=False))
    )
    bound = extra
    for price, group, i in steps:
        needed = kept - num_bytes
        if needed <= 0:
            break
        front = groups[group][0]
        saved = front[i].kept_bytes - front[i + 1].kept_bytes
        taken = min(counts[group][i], int(needed // saved))
        bound = extra + price * min(needed, saved * counts[group][i])
        counts[group][i] -= taken
        counts[group][i + 1] += taken
        kept -= saved * taken
        extra += price * saved * taken
        if counts[group][i] and kept > num_bytes:
            seconds, group, i = min(_last_steps(groups, counts, kept - num_bytes))
            counts[group][i] -= 1
            counts[group][i + 1] += 1
            front = groups[group][0]
            kept -= front[i].kept_bytes - front[i + 1].kept_bytes
            extra += seconds
    if kept > num_bytes:
        return None
    return Kept(extra, kept, tuple(tuple(each) for each in counts), min(bound, extra))


def _last_steps(
    groups: Sequence[tuple[tuple[Choice, ...], int]],
    counts: Sequence[Sequence[int]],
    needed: float,
) -> Iterable[tuple[float, int, int]]:
    """Yield (seconds, group, choice) of single steps that save what is still needed."""
    for group, (front, _) in enumerate(groups):
        for i, (before, after) in enumerate(zip(front, front[1:], strict=False)):
            if counts[group][i] and before.kept_bytes - after.kept_bytes >= needed:
                yield after.extra_seconds - before.extra_seconds, group, i


def convex(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices of a Pareto front that lie on its lower convex hull."""
    hull: list[Choice] = []
    for c in choices:
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (b.extra_seconds - a.extra_seconds) * (a.kept_bytes - c.kept_bytes) < (
                c.extra_seconds - a.extra_seconds
            ) * (a.kept_bytes - b.kept_bytes):
                break
            hull.pop()
        hull.append(c)
    return tuple(hull)
