"""The move: each parameter is updated as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from packlight.capture.whole_step import Consumption
from packlight.moves.draft import Draft
from packlight.moves.move import Effect, Move, Refusal, Room, Stage
from packlight.units import format_bytes

# Of the gradients that wait for one another: what a step of some hundred MiB does not notice, and
# what the smallest one does not.
GROUP_BYTES = (2**20, 2**16)


@dataclass(frozen=True)
class UpdateInBackward(Move):
    """Gradients die one by one: each parameter is updated in the backward, large ones in slices."""

    name: ClassVar[str] = "update-in-backward"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    stage: ClassVar[Stage] = Stage.GRADIENTS

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[UpdateInBackward | Refusal]:
        """Yield the one setting where it keeps every bit."""
        request, updates = draft.request, draft.costs.updates
        if updates is None:
            yield Refusal("there is no optimizer")
        elif request.accumulates:
            yield Refusal("gradients are kept between steps (accumulate=True)")
        elif request.clipping.norm is not None:
            yield Refusal(
                "clipping by the norm of all gradients needs all of them first (clip_grad_value "
                "does not)"
            )
        elif request.scaler is not None:
            yield Refusal(
                "the loss scaler looks at all gradients before it lets the optimizer step"
            )
        elif (name := draft.costs.changed_parameter(draft.loss)) is not None:
            yield Refusal(f"the forward changes {name!r} itself, which is updated after it")
        elif updates.refusal is not None:
            yield Refusal(updates.refusal)
        elif draft.gradients is Consumption.TOGETHER:
            yield UpdateInBackward()

    def apply(self, draft: Draft) -> Draft:
        """Return the draft in which gradients are consumed by updates."""
        return draft.changed(gradients=Consumption.UPDATE)


@dataclass(frozen=True)
class GroupUpdates(Move):
    """Small parameters are updated in the backward several at once: each call takes its time.

    Attributes:
        most_bytes: that the gradients of a group take.
    """

    name: ClassVar[str] = "group-updates"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    is_on_request: ClassVar[bool] = True
    may_save_time: ClassVar[bool] = True

    most_bytes: int

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[GroupUpdates | Refusal]:
        """Yield larger groups, then smaller ones where those do not fit."""
        if draft.gradients is not Consumption.UPDATE:
            yield Refusal("parameters are not updated in the backward")
        elif draft.reduction is not None:
            yield Refusal("gradients of several ranks are reduced, and updated, in buckets")
        else:
            for most_bytes in GROUP_BYTES:
                num_found = len(room.found)
                yield GroupUpdates(most_bytes)
                if len(room.found) > num_found:
                    return

    def apply(self, draft: Draft) -> Draft:
        """Return the draft in which small gradients wait for one another."""
        return draft.changed(group_bytes=self.most_bytes)

    def describe(self, draft: Draft) -> str:
        """Return how large groups are."""
        return f"small parameters updated together, up to {format_bytes(self.most_bytes)} at once"
