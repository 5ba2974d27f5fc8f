"""The most that a rank of a pipeline can hold, whatever the others' pace.

A message occupies its sender until it was received. When that is depends on the other ranks, but
not beyond what the schedule implies: a rank that has received a microbatch's gradient knows that
its forward message has arrived. What is known so, at each instruction, follows from the order
alone (vector clocks: Fidge 1988, Mattern 1989), and bounds what can still be under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from packlight.cluster.instructions import Instruction, PipelineSchedule, Work
from packlight.cluster.timeline import run_order


@dataclass(frozen=True)
class StageBytes:
    """What a stage holds, in bytes.

    Attributes:
        works: what is done with a microbatch in it, in order.
        running: the most while each of these runs, of that microbatch.
        kept: of a microbatch between each and the next.
        arriving: with the forward, of each microbatch until its backward is over.
        leaving: with the forward, until it was received.
        handing: with the backward, until it was received.
    """

    works: tuple[Work, ...]
    running: tuple[int, ...]
    kept: tuple[int, ...]
    arriving: int
    leaving: int
    handing: int

    def changes(self, work: Work) -> tuple[int, int, int]:
        """Return what is held of a microbatch before, while and after something is done with it."""
        index = self.works.index(work)
        is_last = index == len(self.works) - 1
        return (
            self.kept[index - 1] + self.arriving if index else 0,
            self.running[index] + self.arriving,
            0 if is_last else self.kept[index] + self.arriving,
        )

    def keeping(self, part: float) -> StageBytes:
        """Return a part of what is kept, without what runs."""
        kept = tuple(int(part * size) for size in self.kept)
        return replace(self, kept=kept, running=(0,) * len(self.running))


@dataclass(frozen=True)
class Message:
    """What one instruction sends to another rank's.

    Attributes:
        source: makes it.
        target: needs it.
    """

    source: Instruction
    target: Instruction


def messages(schedule: PipelineSchedule) -> dict[Instruction, Message]:
    """Return what each instruction sends to another rank, by the instruction that makes it."""
    found: dict[Instruction, Message] = {}
    for rank, _, instruction in schedule.positions():
        source = schedule.needs(instruction)
        if source is not None and schedule.rank_of_stage[source.stage] != rank:
            found[source] = Message(source, instruction)
    return found


def received_before(schedule: PipelineSchedule) -> list[list[list[Instruction]]]:
    """Return, by rank and position, which sent messages are known to have been received there.

    Each is named once, by the instruction that sent it: at the first instruction of its sender
    that cannot have started otherwise.
    """
    sent = messages(schedule)
    place = {i: (rank, position) for rank, position, i in schedule.positions()}
    clock = [[-1] * schedule.num_ranks for _ in range(schedule.num_ranks)]
    at_end: dict[Instruction, list[int]] = {}
    waiting: list[list[Message]] = [[] for _ in range(schedule.num_ranks)]
    found: list[list[list[Instruction]]] = [[[] for _ in own] for own in schedule.ranks]
    for rank, position in run_order(schedule):
        instruction = schedule.ranks[rank][position]
        source = schedule.needs(instruction)
        if source is not None:
            clock[rank] = [max(a, b) for a, b in zip(clock[rank], at_end[source], strict=True)]
        clock[rank][rank] = position
        at_end[instruction] = list(clock[rank])
        left = []
        for message in waiting[rank]:
            other, there = place[message.target]
            if clock[rank][other] >= there:
                found[rank][position].append(message.source)
            else:
                left.append(message)
        waiting[rank] = left
        if instruction in sent:
            waiting[rank].append(sent[instruction])
    return found


def most_bytes(
    schedule: PipelineSchedule, rank: int, stages: Mapping[int, StageBytes], static_bytes: int
) -> tuple[int, Instruction]:
    """Return the most that a rank can hold, and at which of its instructions.

    Args:
        schedule: of forwards, recomputations and backwards, or their halves.
        rank: whose.
        stages: what its stages hold.
        static_bytes: what it holds throughout.
    """
    held = static_bytes
    sent, received = messages(schedule), received_before(schedule)[rank]
    most, where = held, schedule.ranks[rank][0]
    for position, instruction in enumerate(schedule.ranks[rank]):
        for source in received[position]:
            held -= _sent_bytes(stages, source)
        before, running, after = stages[instruction.stage].changes(instruction.work)
        if held - before + running > most:
            most, where = held - before + running, instruction
        held += after - before
        if instruction in sent:
            held += _sent_bytes(stages, instruction)
    return most, where


def _sent_bytes(stages: Mapping[int, StageBytes], source: Instruction) -> int:
    costs = stages[source.stage]
    return costs.leaving if source.work is Work.FORWARD else costs.handing
