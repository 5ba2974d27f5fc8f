"""Recomputation before the gradient that asks for it has arrived (Athlur et al. 2022).

A rank that waits for a gradient can meanwhile bring back what its backward is going to need. What a
schedule recomputes on the way goes to the front of its backward, in order, as far as that needs
no more memory than the backward does anyway: what is brought back early stays longer.
"""

from __future__ import annotations

from packlight.errors import ScheduleError
from packlight.step import Action, Instruction, Schedule, StepGraph, simulate


def recomputing_ahead(graph: StepGraph, schedule: Schedule) -> tuple[Schedule, int]:
    """Return a schedule with recomputations ahead of the backward, and where the latter begins.

    Args:
        graph: of a stage, without transfers.
        schedule: of it.
    """
    instructions, start = schedule.instructions, schedule.num_forward
    while start < len(instructions) and instructions[start].action is Action.FREE:
        start += 1
    most = _peak(graph, schedule, start)
    ahead: list[Instruction] = []
    left = list(instructions[start:])
    there = _live(graph, instructions[:start])
    changed: set[int] = set()  # made or freed by what comes before, and is not ahead
    index = 0
    while index < len(left):
        instruction = left[index]
        if instruction.action is Action.FREE:
            changed.add(instruction.target)
            index += 1
            continue
        operation = graph.operations[instruction.target]
        is_again = operation.id < graph.num_forward and instruction.overwrite is None
        is_new = (there | changed).isdisjoint(operation.creates)
        if is_again and is_new and there.issuperset(operation.reads):
            order = (*instructions[:start], *ahead, instruction, *left[:index], *left[index + 1 :])
            tried = Schedule(order, schedule.num_forward)
            if _peak(graph, tried, start) > most:
                break
            ahead.append(left.pop(index))
            there.update(operation.creates)
            continue
        changed.update(operation.creates)
        index += 1
    order = (*instructions[:start], *ahead, *left)
    return Schedule(order, schedule.num_forward), start + len(ahead)


def _live(graph: StepGraph, instructions: tuple[Instruction, ...]) -> set[int]:
    live = set(graph.resident)
    for instruction in instructions:
        if instruction.action is Action.FREE:
            live.discard(instruction.target)
            continue
        live.update(graph.operations[instruction.target].creates)
        if instruction.overwrite is not None:
            live.discard(instruction.overwrite[1])
    return live


def _peak(graph: StepGraph, schedule: Schedule, start: int) -> float:
    """Return the most from a position on; no number is large enough for what cannot run."""
    try:
        live = (0, *simulate(graph, schedule).live_bytes)
    except ScheduleError:
        return float("inf")
    most = live[start]
    for index in range(start, len(schedule.instructions)):
        instruction = schedule.instructions[index]
        if instruction.action is Action.RUN:
            workspace = graph.operations[instruction.target].workspace_bytes
            most = max(most, live[index + 1] + workspace, live[index])
    return most
