"""Which values to approximate, and how: the least error for the bytes that are saved.

A value's options lie on a curve of bytes saved against squared error. Of each curve the lower hull
is taken, and the steps of all hulls are made in the order of what they cost for a byte: after any
number of them, no other choice of options on the hulls saves as much with less error. Squares
of errors add up, see `errors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
Option = TypeVar("Option")


@dataclass(frozen=True)
class Priced(Generic[Option]):
    """An option of a value.

    Attributes:
        option: what is done to it.
        saved_bytes: what it then takes less.
        error: what that alone does to the gradient, relative to its norm.
    """

    option: Option
    saved_bytes: int
    error: float


@dataclass(frozen=True)
class Step(Generic[Value, Option]):
    """One value approximated, or approximated more.

    Attributes:
        value: of the model.
        option: what is done to it from here on.
        saved_bytes: more than before.
        squared_error: more than before.
    """

    value: Value
    option: Option
    saved_bytes: int
    squared_error: float

    @property
    def price(self) -> float:
        """Squared error for a byte."""
        return self.squared_error / self.saved_bytes


def steps_in_order(
    options: Mapping[Value, Sequence[Priced[Option]]],
) -> list[Step[Value, Option]]:
    """Return the steps from nothing approximated to the most, the cheapest for a byte first.

    >>> [(s.value, s.option) for s in steps_in_order({
    ...     "a": [Priced("8 bits", 75, 0.01), Priced("4 bits", 87, 0.1)],
    ...     "b": [Priced("8 bits", 75, 0.02)],
    ... })]
    [('a', '8 bits'), ('b', '8 bits'), ('a', '4 bits')]
    """
    steps = [
        step for value, priced in options.items() for step in _hull_steps(value, list(priced))
    ]
    return sorted(steps, key=lambda step: step.price)


def _hull_steps(value: Value, priced: list[Priced[Option]]) -> list[Step[Value, Option]]:
    steps: list[Step[Value, Option]] = []
    at_bytes, at_error = 0, 0.0
    while True:
        further = [
            Step(value, p.option, p.saved_bytes - at_bytes, max(0.0, p.error**2 - at_error))
            for p in priced if p.saved_bytes > at_bytes
        ]
        if not further:
            return steps
        steps.append(min(further, key=lambda step: (step.price, -step.saved_bytes)))
        at_bytes += steps[-1].saved_bytes
        at_error += steps[-1].squared_error


def num_within(steps: Sequence[Step[Value, Option]], limit: float) -> int:
    """Return how many of the steps can be made before the error is above a limit."""
    squared = 0.0
    for place, step in enumerate(steps):
        squared += step.squared_error
        if squared > limit**2:
            return place
    return len(steps)


def chosen(steps: Sequence[Step[Value, Option]]) -> dict[Value, Option]:
    """Return what is done to each value after some steps."""
    return {step.value: step.option for step in steps}
