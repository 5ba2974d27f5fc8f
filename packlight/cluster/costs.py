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


def cheapest_within(
    layers: Sequence[Layer], num_bytes: float
) -> tuple[float, int, tuple[str, ...]] | None:
    """Return the seconds, bytes and names of the fastest choices that keep at most `num_bytes`.

    The steps of all layers' convex fronts are taken in the order of bytes saved per second. That
    is the optimum of the relaxation in which a layer may be part one, part the other; the last
    step taken is then improved upon by the cheapest single step that suffices. Equal layers with
    convex fronts, as in a transformer, are solved exactly (tests compare with all combinations).

    Returns:
        None if even the smallest choices keep more.
    """
    fronts = [_convex(layer.choices) for layer in layers]
    kept = sum(front[0].kept_bytes for front in fronts)
    at = [0] * len(layers)
    steps = sorted(
        (
            (later.extra_seconds - front[i].extra_seconds)
            / max(front[i].kept_bytes - later.kept_bytes, 1),
            index,
            i,
        )
        for index, front in enumerate(fronts)
        for i, later in enumerate(front[1:])
    )
    for place, (_, index, i) in enumerate(steps):
        if kept <= num_bytes:
            break
        needed = kept - num_bytes
        front = fronts[index]
        step = front[i].kept_bytes - front[i + 1].kept_bytes
        if step >= needed:
            index, i = _cheapest_last(fronts, at, steps[place:], needed)
            step = fronts[index][i].kept_bytes - fronts[index][i + 1].kept_bytes
        at[index] = i + 1
        kept -= step
    if kept > num_bytes:
        return None
    taken = [front[i] for front, i in zip(fronts, at, strict=True)]
    return sum(c.extra_seconds for c in taken), kept, tuple(c.name for c in taken)


def _cheapest_last(
    fronts: Sequence[tuple[Choice, ...]],
    at: Sequence[int],
    steps: Sequence[tuple[float, int, int]],
    needed: float,
) -> tuple[int, int]:
    """Return the open step that saves what is needed and takes the fewest seconds."""
    def seconds(index: int, i: int) -> float:
        return fronts[index][i + 1].extra_seconds - fronts[index][i].extra_seconds

    enough = [
        (seconds(index, i), index, i)
        for _, index, i in steps
        if at[index] == i
        and fronts[index][i].kept_bytes - fronts[index][i + 1].kept_bytes >= needed
    ]
    _, index, i = min(enough)
    return index, i


def _convex(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Return the choices on the lower convex hull of bytes and seconds."""
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
