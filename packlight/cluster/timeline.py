"""When everything in a pipeline happens, and what each rank holds: the judge of schedules.

Each rank works through its instructions in order; an instruction starts when the rank is free and
what it needs has come. A message takes its sender's time, too (`blocking`: Megatron's
synchronous sends) or goes over a link of its own, one after the other. Memory follows from the
order on each rank alone: a forward adds what its stage keeps, the end of the backward takes it
away, and what runs has its workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from packlight.cluster.costs import StageCosts
from packlight.cluster.instructions import (
    ENDS,
    Instruction,
    PipelineSchedule,
    Work,
    weight_versions,
)
from packlight.errors import PipelineError


@dataclass(frozen=True, slots=True)
class Run:
    """One instruction with its times, in seconds from the start."""

    instruction: Instruction
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class PipelineTimeline:
    """What `simulate_pipeline` found.

    Attributes:
        schedule: what was simulated.
        runs: of each rank, in order.
        total_seconds: until the last rank is done.
        busy_seconds: of each rank, computing.
        sending_seconds: of each rank, occupied by messages.
        frames: of each rank, the most microbatches in flight, over all of its stages.
        peak_bytes: of each rank.
    """

    schedule: PipelineSchedule = field(repr=False)
    runs: tuple[tuple[Run, ...], ...] = field(repr=False)
    total_seconds: float
    busy_seconds: tuple[float, ...]
    sending_seconds: tuple[float, ...]
    frames: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do nothing."""
        occupied = sum(self.busy_seconds) + sum(self.sending_seconds)
        return 1 - occupied / (self.total_seconds * len(self.runs)) if self.total_seconds else 0.0


def run_order(schedule: PipelineSchedule) -> list[tuple[int, int]]:
    """Return (rank, position) of all instructions in an order in which they can run.

    Raises:
        PipelineError: ranks wait for each other.
    """
    waiting: dict[int, int] = {}
    done: set[int] = set()
    at = [0] * schedule.num_ranks
    order: list[tuple[int, int]] = []
    runnable = list(range(schedule.num_ranks - 1, -1, -1))
    while runnable:
        rank = runnable.pop()
        instructions = schedule.ranks[rank]
        while at[rank] < len(instructions):
            makes, needs = _messages(schedule, instructions[at[rank]])
            if needs is not None and needs not in done:
                waiting[needs] = rank
                break
            order.append((rank, at[rank]))
            at[rank] += 1
            if makes is not None:
                done.add(makes)
                if (woken := waiting.pop(makes, None)) is not None:
                    runnable.append(woken)
    stuck = [r for r in range(schedule.num_ranks) if at[r] < len(schedule.ranks[r])]
    if stuck:
        raise _deadlock(schedule, at, stuck)
    return order


def _messages(
    schedule: PipelineSchedule, instruction: Instruction
) -> tuple[int | None, int | None]:
    """Return the numbers of what an instruction hands on, and of what it needs.

    Even numbers are forwards (named by the stage that makes them), odd ones backwards.
    """
    stage, width = instruction.stage, 2 * schedule.num_microbatches
    is_first, is_last = schedule.is_first(stage), schedule.is_last(stage)
    number = stage * width + 2 * instruction.microbatch
    if instruction.work is Work.FORWARD:
        return None if is_last else number, None if is_first else number - width
    if instruction.work in ENDS:
        return None if is_first else number + 1, None if is_last else number + 1 + width
    return None, None


def simulate_pipeline(
    schedule: PipelineSchedule,
    stages: Sequence[StageCosts],
    *,
    blocking: bool = True,
) -> PipelineTimeline:
    """Return when each instruction runs, and each rank's peak.

    Args:
        schedule: the instructions.
        stages: what each stage costs.
        blocking: whether a sender waits until its message is over.

    Raises:
        PipelineError: ranks wait for each other.
    """
    assert len(stages) == schedule.num_stages, "one cost for each stage"
    durations = [_durations(schedule, stage, costs) for stage, costs in enumerate(stages)]
    place, width = schedule.rank_of_stage, 2 * schedule.num_microbatches
    num_ranks = schedule.num_ranks
    free, busy, sending = [0.0] * num_ranks, [0.0] * num_ranks, [0.0] * num_ranks
    links: dict[tuple[int, int], float] = {}
    arrived: dict[int, float] = {}
    runs: list[list[Run]] = [[] for _ in range(num_ranks)]
    for rank, position in run_order(schedule):
        instruction = schedule.ranks[rank][position]
        stage, start = instruction.stage, free[rank]
        makes, needs = _messages(schedule, instruction)
        if needs is not None:
            start = max(start, arrived.pop(needs))
            sender = needs // width
            if blocking and place[sender] != rank:
                received = stages[min(sender, stage)].receive_seconds
                start += received
                sending[rank] += received
        seconds = durations[stage][instruction.work]
        end = start + seconds
        busy[rank] += seconds
        runs[rank].append(Run(instruction, start, end))
        free[rank] = end
        if makes is None:
            continue
        target = stage - 1 if makes & 1 else stage + 1
        other, costs = place[target], stages[min(target, stage)]
        if other == rank:
            arrived[makes] = end
        elif blocking:
            free[rank] = arrived[makes] = end + costs.send_seconds
            sending[rank] += costs.send_seconds
        else:
            gone = max(end, links.get((rank, other), 0.0)) + costs.send_seconds
            links[rank, other] = gone
            arrived[makes] = gone + costs.receive_seconds
    frames, peaks = _memory(schedule, stages)
    return PipelineTimeline(
        schedule, tuple(tuple(r) for r in runs), max(free), tuple(busy), tuple(sending), frames,
        peaks,
    )


def _durations(
    schedule: PipelineSchedule, stage: int, costs: StageCosts
) -> dict[Work, float]:
    instructions = schedule.ranks[schedule.rank_of_stage[stage]]
    ahead = any(i.work is Work.RECOMPUTE and i.stage == stage for i in instructions)
    again = 0.0 if ahead else costs.recompute_seconds
    return {
        Work.FORWARD: costs.forward_seconds,
        Work.BACKWARD: costs.input_seconds + costs.weight_seconds + again,
        Work.INPUT: costs.input_seconds + again,
        Work.WEIGHT: costs.weight_seconds,
        Work.RECOMPUTE: costs.recompute_seconds,
        Work.UPDATE: costs.update_seconds,
    }


def _memory(
    schedule: PipelineSchedule, stages: Sequence[StageCosts]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each rank's most microbatches in flight, and its peak."""
    versions = weight_versions(schedule)
    frames, peaks = [], []
    for rank, instructions in enumerate(schedule.ranks):
        own = {i.stage for i in instructions}
        base = sum(
            stages[s].static_bytes + (versions[rank] - 1) * stages[s].version_bytes for s in own
        )
        held = most_held = flying = most_flying = 0
        for instruction in instructions:
            costs = stages[instruction.stage]
            running = 0
            if instruction.work is Work.FORWARD:
                held += costs.kept_bytes
                flying += 1
            elif instruction.work is Work.RECOMPUTE:
                held += costs.workspace_bytes
            elif instruction.work in ENDS:
                running = costs.workspace_bytes
            most_flying = max(most_flying, flying)
            most_held = max(most_held, held + running)
            if instruction.work is Work.BACKWARD:
                held -= costs.kept_bytes
                flying -= 1
            elif instruction.work is Work.INPUT:
                held += costs.held_bytes - costs.kept_bytes
            elif instruction.work is Work.WEIGHT:
                held -= costs.held_bytes
                flying -= 1
        frames.append(most_flying)
        peaks.append(base + most_held)
    return tuple(frames), tuple(peaks)


def _deadlock(
    schedule: PipelineSchedule, at: Sequence[int], stuck: Sequence[int]
) -> PipelineError:
    """Return the error that names a circle of ranks, each waiting for the next."""
    def awaited(rank: int) -> Instruction:
        needed = schedule.needs(schedule.ranks[rank][at[rank]])
        assert needed is not None
        return needed

    path = [stuck[0]]
    while (following := schedule.rank_of_stage[awaited(path[-1]).stage]) not in path:
        if following not in stuck:
            break
        path.append(following)
    circle = path[path.index(following):] if following in path else path
    waits = "; ".join(
        f"rank {rank} cannot start {schedule.ranks[rank][at[rank]]} before {awaited(rank)}, "
        f"which is on rank {schedule.rank_of_stage[awaited(rank).stage]}"
        for rank in circle
    )
    return PipelineError(circle[0], at[circle[0]], f"ranks wait for each other: {waits}")
