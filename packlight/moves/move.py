"""What a move is: one way to make a step smaller or faster, as a frozen object.

A move's fields are its setting, so that a way to run a step, a tuple of moves, is data: it
compares, hashes, and is written as JSON. A class of moves enumerates its own settings (`space`) and
shapes a draft of the step (`apply`); which of them are worth their time is the search's business,
which knows no move by name. The shape is that of xDSL's passes.

Packages bring their own through the entry point group `packlight.moves`: see `registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from packlight.moves.draft import Draft

# How much faster a step that rounds its sums in another order must be. Times of one way and another
# are a few percent apart by chance, and what lies between calls is in none of them.
ROUNDING_MARGIN = 1.05


class Effect(StrEnum):
    """What a move does to the numbers of a step."""

    SAME_BITS = "same bits"
    REORDERS_SUMS = "order of sums"
    APPROXIMATE = "approximate"


class Stage(IntEnum):
    """When a move shapes the draft. The search looks at moves stage by stage.

    LOSS: before the loss is traced. Made where it is allowed by name.
    BATCH: how often a smaller batch runs. All that follows is looked at for each setting.
    GRADIENTS: what becomes of them. Made wherever it can be.
    GRAPH: the joint graph is rewritten. One after the other, each on top of what helped so far.
    PLACEMENT: where parameters, states and activations lie. Looked at for each rewritten graph.
    """

    LOSS = 0
    BATCH = 1
    GRADIENTS = 2
    GRAPH = 3
    PLACEMENT = 4


@dataclass(frozen=True)
class Refusal:
    """Why a move has no (further) setting for a draft.

    Attributes:
        reason: in words.
        what: is not possible; by default the move.
    """

    reason: str
    what: str = ""


@runtime_checkable
class Outcome(Protocol):
    """What is known of a way that was planned."""

    @property
    def seconds(self) -> float:
        """Predicted duration of the step."""

    @property
    def slowdown(self) -> float:
        """... over that of the same calls without recomputation or transfers."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done that costs time."""


@dataclass(frozen=True)
class Room:
    """What there is to plan with, and what was found so far.

    Attributes:
        left_bytes: what a schedule may allocate, with all elsewhere that can be; None for no limit.
        found: moves -> the way that they lead to, for those that fit. It grows while a move's
            settings are iterated over: a generator can look at what became of the one before.
    """

    left_bytes: int | None
    found: Mapping[tuple[Move, ...], Outcome]

    @property
    def least_slowdown(self) -> float | None:
        """Of what was found; None if nothing was."""
        return min((way.slowdown for way in self.found.values()), default=None)

    @property
    def has_plain(self) -> bool:
        """Whether the step fits without anything that costs time, or that anybody asked to save."""
        if self.left_bytes is None:
            return bool(self.found)
        return any(way.is_plain for way in self.found.values())


@dataclass(frozen=True)
class Move:
    """Base of all moves: a subclass is a frozen dataclass whose fields are its setting.

    Fields are of types that JSON has: int, float, str, bool, None, and tuples of them.

    Attributes:
        name: what users call it in `moves=`, and what it is written as.
        effect: on the numbers.
        stage: when it shapes the draft.
        techniques: approximate techniques that `allow=` has to name for this to use them.
        is_on_request: only made where `moves=` names it: it costs something beside the step.
        may_save_time: worth looking at also where the step fits without anything that costs time.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    stage: ClassVar[Stage] = Stage.GRAPH
    techniques: ClassVar[tuple[str, ...]] = ()
    is_on_request: ClassVar[bool] = False
    may_save_time: ClassVar[bool] = False

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterable[Self | Refusal]:
        """Yield the settings worth trying for a draft, the mildest first; or why there are none.

        Args:
            draft: the step as the moves of earlier stages shaped it; its loss is traced (but for
                `Stage.LOSS`).
            room: what there is to plan with.
        """
        raise NotImplementedError

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with this move made; the given one stays as it is."""
        raise NotImplementedError

    def describe(self, draft: Draft) -> str:
        """Return what is done, in a few words; empty where nothing is to be told.

        Args:
            draft: as it was before this move.
        """
        return self.name

    @classmethod
    def between(cls, mild: Self | None, strong: Self) -> Self | None:
        """Return a setting between one that does not fit and one that does, where that is worth it.

        Args:
            mild: does not fit; None for the step without this move.
            strong: fits.
        """
        return None

    @property
    def is_free(self) -> bool:
        """Whether all that this costs in time is a schedule's slowdown."""
        return True

    @property
    def penalty(self) -> float:
        """How many times slower than without it a step may seem to the search, beyond its time."""
        return 1.0
