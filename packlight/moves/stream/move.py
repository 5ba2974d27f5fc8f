"""The move: activations, optimizer state and parameters lie on a disk while nobody needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from packlight.capture.whole_step import Consumption
from packlight.moves.draft import Draft
from packlight.moves.move import Effect, Move, Refusal, Room, Stage
from packlight.moves.stream.parameters import why_not_all
from packlight.moves.stream.streamed import Streaming
from packlight.units import format_bytes

# Parameters are streamed where all else takes this many times as long as the plain step.
MUCH_SLOWER = 2.0


@dataclass(frozen=True)
class Offload(Move):
    """Buffers leave memory between their uses; which activations do, the planner decides.

    Attributes:
        states: optimizer state rests on the disk between updates.
        parameters: so do parameters (and large buffers of the model) between their uses.
    """

    name: ClassVar[str] = "offload"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    stage: ClassVar[Stage] = Stage.PLACEMENT

    states: bool = False
    parameters: bool = False

    @property
    def is_free(self) -> bool:
        """What rests on the disk has to come and go, which no schedule is without."""
        return not (self.states or self.parameters)

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Offload | Refusal]:
        """Yield activations alone, state, parameters as well: each where what was found is slow."""
        if draft.offered is None:
            return
        yield Offload()
        if room.has_plain or (draft.num_repeats > 1 and room.found):
            return
        all_of_it = streamable(draft)
        if all_of_it.states:
            yield Offload(states=True)
        slowdown = room.least_slowdown
        if slowdown is not None and slowdown < MUCH_SLOWER:
            return
        reason = why_not_all(draft.request.model, all_of_it.parameters)
        if reason is not None:
            yield Refusal(reason, "streaming all parameters")
        if all_of_it.parameters:
            yield Offload(bool(all_of_it.states), True)

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with what rests on the disk, on the machine with the lane to it."""
        all_of_it = streamable(draft) if self.states or self.parameters else Streaming()
        streaming = Streaming(
            all_of_it.states if self.states else {},
            all_of_it.parameters if self.parameters else {},
        )
        assert draft.offered is not None, "offloading is offered with a machine"
        machine = draft.offered
        for lane in draft.machine.lanes if draft.machine is not None else ():  # to other ranks
            machine = machine.with_lane(lane)
        return draft.changed(machine=machine, streaming=streaming)

    def describe(self, draft: Draft) -> str:
        """Return what rests on the disk; activations are the schedule's to tell."""
        streaming, words = self.apply(draft).streaming, []
        num_states = sum(1 for named in streaming.states.values() if named)
        if num_states:
            words.append(f"optimizer state of {num_states} parameters offloaded between updates")
        if streaming.parameters:
            num_streamed = sum(isinstance(t, nn.Parameter) for t in streaming.parameters)
            num_parameters = len(list(draft.request.model.parameters()))
            words.append(
                f"parameters streamed: {num_streamed} of {num_parameters}, "
                f"{format_bytes(streaming.parameter_bytes)}"
            )
        return ", ".join(words)


def streamable(draft: Draft) -> Streaming:
    """Return all that could lie on the disk: what is updated together, cannot."""
    request = draft.request
    if draft.offered is None or request.offload_directory is None or request.shards:
        return Streaming()  # what is on no disk cannot be mapped for whoever looks at it

    def found() -> Streaming:
        how, costs = draft.gradients, draft.costs
        is_one_by_one = how is Consumption.UPDATE or (
            how is Consumption.ACCUMULATE and costs.steps_alone
        )
        states = costs.state_slots() if is_one_by_one else {}
        parameters = costs.parameter_slots(draft.loss, how)
        return Streaming(states if any(states.values()) else {}, parameters)

    return draft.once("streamable", found)
