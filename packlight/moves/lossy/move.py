"""The move: what the backward reads is approximated, as far as the gradient's error may go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from packlight.costs.measure import real_tensors
from packlight.errors import WayError
from packlight.lossy.packing import prepare
from packlight.moves.draft import Draft
from packlight.moves.lossy.choice import Priced, Step, chosen, num_within, steps_in_order
from packlight.moves.lossy.errors import GradientErrors
from packlight.moves.lossy.rewrite import approximated
from packlight.moves.lossy.saved import SavedValue, saved_values
from packlight.moves.lossy.techniques import TECHNIQUES, Setting, setting_named, settings_of
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.units import format_bytes

# A limit on the gradient's error where the user names none.
DEFAULT_GRADIENT_ERROR = 0.02
# An exact step that is slower by less is taken instead.
EXACT_MARGIN = 1.05
# Where a choice's measured error is above the limit, fewer approximations are chosen; so often.
_MOST_CORRECTIONS = 4
# The search for the mildest choice that needs nothing recomputed ends at this share of all steps.
_RESOLUTION = 16

Steps = Sequence[Step[SavedValue, Setting]]


@dataclass(frozen=True)
class Lossy(Move):
    """The backward reads approximations of what the forward made.

    Attributes:
        choices: for each value that can be approximated, in the order of the forward, the name of
            what is done to it ("packed-4"); empty where it is kept whole.
        predicted_error: of the gradient, relative to its norm: from errors of single values.
        measured_error: the same, of all of them together, on the example batch.
    """

    name: ClassVar[str] = "lossy"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    techniques: ClassVar[tuple[str, ...]] = TECHNIQUES

    choices: tuple[str, ...]
    predicted_error: float = 0.0
    measured_error: float = 0.0

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Lossy | Refusal]:
        """Yield the most that the error's limit allows, then milder choices, while those fit."""
        if draft.request.num_ranks is not None:
            yield Refusal("ranks would have to agree on errors, which each measures for itself")
            return
        values = saved_values(draft.graph_module)
        options = {v: settings_of(v, draft.request.allow) for v in values}
        options = {value: possible for value, possible in options.items() if possible}
        if not options:
            yield Refusal("the backward reads nothing that what is allowed can approximate")
            return
        _prepare(draft)
        chooser = _Chooser(values, GradientErrors(draft.graph_module, draft.loss))
        limit = error_limit(draft)
        try:
            steps = chooser.priced_steps(options)
            most, count = chooser.setting(steps, num_within(steps, limit), limit)
            if most is None:
                yield Refusal(_too_strict(steps, limit))
                return
            yield most
            if not _fits(most, room):
                yield Refusal(_too_little(steps, count, limit), f"more of {cls.name}")
                return
            low, high = 0, count
            while high - low > max(1, len(steps) // _RESOLUTION):
                middle = (low + high) // 2
                milder, _ = chooser.setting(steps, middle, limit)
                if milder is not None:
                    yield milder
                is_enough = milder is not None and _is_plain(milder, room)
                low, high = (low, middle) if is_enough else (middle, high)
        except ArithmeticError as problem:
            yield Refusal(f"errors are measured on the example batch, and {problem}")

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten.

        Raises:
            WayError: the setting is for another graph, or for what is not allowed here.
        """
        values = saved_values(draft.graph_module)
        if len(values) != len(self.choices):
            raise WayError(
                "step", f"{len(self.choices)} values that can be approximated", len(values),
                "leave way= out, and one is found",
            )
        what = {
            v: setting_named(name) for v, name in zip(values, self.choices, strict=True) if name
        }
        used = {setting.technique for setting in what.values()}
        if not used <= draft.request.allow:
            raise WayError(
                "set of techniques", f"it uses {', '.join(sorted(used))}",
                f"allowed: {', '.join(sorted(draft.request.allow)) or 'none'}", "pass allow="
            )
        if self.measured_error > error_limit(draft):
            raise WayError(
                "gradient error", f"{self.measured_error:.3g}", f"within {error_limit(draft):.3g}",
                "pass a larger max_gradient_error=, or leave way= out, and one is found",
            )
        _prepare(draft)
        return draft.changed(module=approximated(draft.graph_module, what))

    def describe(self, draft: Draft) -> str:
        """Return what is approximated, and the errors."""
        used = Counter(filter(None, self.choices))
        parts = ", ".join(f"{name} {count}" for name, count in sorted(used.items()))
        return (
            f"{used.total()} of {len(self.choices)} saved values approximated ({parts}), gradient "
            f"error {self.predicted_error:.2%} predicted, {self.measured_error:.2%} measured"
        )

    @property
    def penalty(self) -> float:
        """How much faster than an exact step it has to be."""
        return EXACT_MARGIN


def _prepare(draft: Draft) -> None:
    with real_tensors():  # a draft may be shaped while its loss is being compiled
        prepare(draft.costs.device)


def error_limit(draft: Draft) -> float:
    """Return how wrong the gradient may be."""
    limit = draft.request.max_gradient_error
    return DEFAULT_GRADIENT_ERROR if limit is None else limit


class _Chooser:
    """Makes settings of numbers of steps, and measures their errors."""

    def __init__(self, values: Sequence[SavedValue], errors: GradientErrors) -> None:
        self._values, self._errors = values, errors

    def priced_steps(self, options: Mapping[SavedValue, Sequence[Setting]]) -> Steps:
        """Return the steps to less memory, with measured errors."""
        error_of = self._errors.by_value(options)
        return steps_in_order({
            value: [
                Priced(s, value.num_bytes - s.kept_bytes(value), error_of[value, s])
                for s in possible
            ]
            for value, possible in options.items()
        })

    def setting(self, steps: Steps, count: int, limit: float) -> tuple[Lossy | None, int]:
        """Return the first steps as a setting, or fewer of them if their error is too large.

        Returns:
            the setting, None if not even one step is within the limit; how many steps it makes.
        """
        for _ in range(_MOST_CORRECTIONS):
            if count == 0:
                break
            what = chosen(steps[:count])
            (measured,) = self._errors.measured([what])
            predicted = math.sqrt(sum(step.squared_error for step in steps[:count]))
            if measured <= limit:
                names = tuple(what[v].name if v in what else "" for v in self._values)
                return Lossy(names, predicted, measured), count
            count = min(count - 1, num_within(steps, predicted * limit / measured))
        return None, 0


def _too_strict(steps: Steps, limit: float) -> str:
    least = math.sqrt(min(step.squared_error for step in steps))
    return (
        f"max_gradient_error={limit:.2g} allows nothing: the least that an approximation makes is "
        f"{least:.2g}"
    )


def _too_little(steps: Steps, count: int, limit: float) -> str:
    saved, everything = (sum(s.saved_bytes for s in part) for part in (steps[:count], steps))
    error = math.sqrt(sum(step.squared_error for step in steps))
    return (
        f"max_gradient_error={limit:.2g} saves {format_bytes(saved)}, which is too little; "
        f"{error:.2g} would save {format_bytes(everything)}"
    )


def _fits(setting: Lossy, room: Room) -> bool:
    return any(setting in moves for moves in room.found)


def _is_plain(setting: Lossy, room: Room) -> bool:
    return any(setting in moves and way.is_plain for moves, way in room.found.items())
