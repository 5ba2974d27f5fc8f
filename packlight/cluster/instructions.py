"""A pipeline's schedule as data: for each rank, what it does in which order.

A model is cut into stages, each on one rank (a rank may have several), and a batch into
microbatches. What crosses from stage to stage follows from the instructions: a stage's forward
needs the forward of the stage before it, its backward that of the stage behind it. `check` proves
that a schedule can run; `simulate_pipeline` says when everything happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from packlight.errors import PipelineError


class Work(StrEnum):
    """What a rank does with one microbatch in one of its stages.

    BACKWARD is the whole of it; INPUT and WEIGHT are its halves, of which only INPUT lets the stage
    before go on. RECOMPUTE brings back what the stage's choice does not keep, before the gradient
    is there; without it the backward does so itself. UPDATE steps the stage's parameters.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"
    RECOMPUTE = "R"
    UPDATE = "U"


# After these the stage before can go on.
ENDS = (Work.BACKWARD, Work.INPUT)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One piece of work; for UPDATE, `microbatch` is the last that it includes."""

    work: Work
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """Return such as "F3 of stage 1"."""
        return f"{self.work}{self.microbatch} of stage {self.stage}"


@dataclass(frozen=True)
class PipelineSchedule:
    """The instructions of all ranks.

    Attributes:
        name: for reports.
        rank_of_stage: where each stage is.
        num_microbatches: of all batches that it covers, on each way.
        ranks: for each rank its instructions, in order.
        num_ways: how many times the model is there, each with microbatches of its own: stages are
            numbered one way after the other.

    >>> from packlight.cluster.schedules import one_f_one_b
    >>> for instructions in one_f_one_b(2, 3).ranks:
    ...     print(" ".join(f"{i.work}{i.microbatch}" for i in instructions))
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2
    """

    name: str
    rank_of_stage: tuple[int, ...]
    num_microbatches: int
    ranks: tuple[tuple[Instruction, ...], ...]
    num_ways: int = 1

    @property
    def num_ranks(self) -> int:
        """How many ranks take part."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """How many stages there are on all ranks together."""
        return len(self.rank_of_stage)

    def needs(self, instruction: Instruction) -> Instruction | None:
        """Return what another stage must have done before, if anything."""
        stage, microbatch = instruction.stage, instruction.microbatch
        if instruction.work is Work.FORWARD and not self.is_first(stage):
            return Instruction(Work.FORWARD, stage - 1, microbatch)
        if instruction.work in ENDS and not self.is_last(stage):
            work = Work.INPUT if stage + 1 in self.split_stages else Work.BACKWARD
            return Instruction(work, stage + 1, microbatch)
        return None

    def is_first(self, stage: int) -> bool:
        """Whether a stage is the first of its way."""
        return stage % (self.num_stages // self.num_ways) == 0

    def is_last(self, stage: int) -> bool:
        """Whether a stage is the last of its way."""
        return self.is_first(stage + 1)

    @cached_property
    def split_stages(self) -> frozenset[int]:
        """The stages whose backward runs in halves."""
        return frozenset(i.stage for _, _, i in self.positions() if i.work is Work.INPUT)

    @cached_property
    def ahead_stages(self) -> frozenset[int]:
        """The stages that recompute before their backward begins."""
        return frozenset(i.stage for _, _, i in self.positions() if i.work is Work.RECOMPUTE)

    def positions(self) -> Iterator[tuple[int, int, Instruction]]:
        """Yield (rank, position, instruction) of all instructions."""
        for rank, instructions in enumerate(self.ranks):
            for position, instruction in enumerate(instructions):
                yield rank, position, instruction


def check(schedule: PipelineSchedule) -> None:
    """Prove that a schedule can run to its end.

    Every microbatch goes forward and backward once through every stage, on the stage's rank, and
    in an order that makes sense there; and no rank waits for one that waits for it.

    Raises:
        PipelineError: at the first instruction that is wrong, or with the circle of ranks that
            wait for each other.
    """
    from packlight.cluster.timeline import run_order

    counts: Counter[Instruction] = Counter()
    for rank, position, instruction in schedule.positions():
        _check_place(schedule, rank, position, instruction)
        _check_order(schedule, rank, position, instruction, counts)
        counts[instruction] += 1
    for stage, rank in enumerate(schedule.rank_of_stage):
        halves = (Work.INPUT, Work.WEIGHT) if stage in schedule.split_stages else (Work.BACKWARD,)
        for work in (Work.FORWARD, *halves):
            for microbatch in range(schedule.num_microbatches):
                if not counts[Instruction(work, stage, microbatch)]:
                    missing = Instruction(work, stage, microbatch)
                    raise PipelineError(rank, None, f"{missing} never runs")
    run_order(schedule)


def _check_place(
    schedule: PipelineSchedule, rank: int, position: int, instruction: Instruction
) -> None:
    stage, microbatch = instruction.stage, instruction.microbatch
    if not 0 <= stage < schedule.num_stages or not 0 <= microbatch < schedule.num_microbatches:
        raise PipelineError(
            rank, position,
            f"{instruction} does not exist: there are {schedule.num_stages} stages and "
            f"{schedule.num_microbatches} microbatches",
        )
    if schedule.rank_of_stage[stage] != rank:
        raise PipelineError(
            rank, position, f"{instruction} belongs to rank {schedule.rank_of_stage[stage]}"
        )


def _check_order(
    schedule: PipelineSchedule,
    rank: int,
    position: int,
    instruction: Instruction,
    counts: Counter[Instruction],
) -> None:
    split = instruction.stage in schedule.split_stages
    before = {
        Work.FORWARD: (),
        Work.RECOMPUTE: (Work.FORWARD,),
        Work.BACKWARD: (Work.FORWARD,),
        Work.INPUT: (Work.FORWARD,),
        Work.WEIGHT: (Work.INPUT,),
        Work.UPDATE: (Work.WEIGHT if split else Work.BACKWARD,),
    }[instruction.work]
    stage, microbatch = instruction.stage, instruction.microbatch
    for work in before:
        if not counts[Instruction(work, stage, microbatch)]:
            raise PipelineError(
                rank, position, f"{instruction} comes before {Instruction(work, stage, microbatch)}"
            )
    again = counts[instruction]
    if instruction.work is Work.BACKWARD:
        again += counts[Instruction(Work.INPUT, stage, microbatch)]
    if instruction.work is Work.INPUT:
        again += counts[Instruction(Work.BACKWARD, stage, microbatch)]
    if instruction.work is Work.RECOMPUTE:
        again += counts[Instruction(Work.BACKWARD, stage, microbatch)]
        again += counts[Instruction(Work.INPUT, stage, microbatch)]
    if again:
        raise PipelineError(rank, position, f"{instruction} runs a second time, or too late")


def weight_versions(schedule: PipelineSchedule) -> tuple[int, ...]:
    """Return how many versions of its parameters each rank has to keep at once.

    A microbatch's backward needs the parameters that its forward had: each UPDATE between the two
    makes another version that has to stay (PipeDream's weight stashing: as many as there are
    microbatches in flight; PipeDream-2BW: two). One where a rank never updates with microbatches
    in flight.
    """
    most = [1] * schedule.num_ranks
    for rank, instructions in enumerate(schedule.ranks):
        now: Counter[int] = Counter()
        version_of: dict[tuple[int, int], int] = {}
        if not any(i.work is Work.UPDATE for i in instructions):
            continue
        for instruction in instructions:
            key = (instruction.stage, instruction.microbatch)
            if instruction.work is Work.UPDATE:
                now[instruction.stage] += 1
            elif instruction.work is Work.FORWARD:
                version_of[key] = now[instruction.stage]
            elif instruction.work in (Work.BACKWARD, Work.WEIGHT):
                del version_of[key]
            held = {(stage, version) for (stage, _), version in version_of.items()}
            stages = {stage for stage, _ in held} | set(now) | {instruction.stage}
            held |= {(stage, now[stage]) for stage in stages}
            of_one = Counter(stage for stage, _ in held)
            most[rank] = max(most[rank], max(of_one.values()))
    return tuple(most)
