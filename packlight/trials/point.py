"""The functions of a FILE with a trial's values for those of their arguments that bear its names.

def space(trial):
return {"width": trial.suggest_int("width", 32, 256, log=True), ...}

def model(width=128): ...                  # gets the trial's width
def batches(split="train", batch=48): ...  # ... and its batch
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from packlight.errors import OptionError
from packlight.example import Example

# The functions, and how many arguments they get anyway.
_FUNCTIONS = {"model": 0, "loss": 2, "optimizer": 1, "batches": 1, "error": 2}
# What `fit` takes, and a point may hold.
FIT_OPTIONS = ("allow", "moves")


def with_point(example: Example, point: dict[str, Any]) -> Example:
    """Return an example whose functions get a point's values.

    Raises:
        OptionError: a value that no function takes.
    """
    bound: dict[str, Any] = {}
    taken = set(FIT_OPTIONS)
    for name, num_given in _FUNCTIONS.items():
        function: Callable[..., Any] | None = getattr(example, name)
        if function is None:
            continue
        values = {key: point[key] for key in _argument_names(function, num_given) if key in point}
        taken |= set(values)
        if values:
            bound[name] = functools.partial(function, **values)
    unused = [key for key in point if key not in taken]
    if unused:
        raise OptionError(
            f"{example.path}: space() returns {unused[0]!r}, which no function takes\n"
            f"hint: give one of {', '.join(_FUNCTIONS)} an argument {unused[0]!r}; "
            f"{' and '.join(map(repr, FIT_OPTIONS))} are options of packlight.fit"
        )
    return replace(example, **bound)


def fit_options(point: dict[str, Any]) -> dict[str, Any]:
    """Return what of a point is for `fit`; names are separated by commas."""
    return {
        key: tuple(filter(None, str(point[key]).split(",")))
        for key in FIT_OPTIONS
        if key in point
    }


def checked_point(values: Any, file: str, num_asked: int) -> dict[str, Any]:
    """Return what `space` returned.

    Args:
        values: what it returned.
        file: that defines it, for errors.
        num_asked: how many values it asked the trial for.

    Raises:
        OptionError: it is no dict by name of plain values, or nothing is searched.
    """
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise OptionError(
            f"{file}: space() returned a {type(values).__name__}\n"
            'hint: a dict of values by name, such as {"width": trial.suggest_int("width", 8, 64)}'
        )
    if not num_asked:
        raise OptionError(
            f"{file}: space() asks the trial for nothing, so that all trials would be one\n"
            'hint: {"width": trial.suggest_int("width", 8, 64)}, for example'
        )
    for name, value in values.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise OptionError(
                f"{file}: space() returns a {type(value).__name__} as {name!r}\nhint: numbers and "
                "strings can be compared and stored; make of them what you need in model()"
            )
    return values


def _argument_names(function: Callable[..., Any], num_given: int) -> list[str]:
    """Return a function's arguments that may be given by name behind those that are anyway."""
    parameters = list(inspect.signature(function).parameters.values())[num_given:]
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
