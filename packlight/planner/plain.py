"""The plain step as a schedule: every operation once, every buffer freed at its last use."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.step import Action, Instruction, Schedule, StepGraph


def plain_schedule(graph: StepGraph) -> Schedule:
    """Return the plain step: everything kept, freed at last use, in place where possible."""
    return schedule_from_order(graph, range(graph.num_computations), graph.num_forward)


def schedule_from_order(
    graph: StepGraph, order: Sequence[int], num_forward: int, in_place: bool = True
) -> Schedule:
    """Return the schedule that runs operations in an order and frees as early as it can.

    An operation may stand in the order several times. A buffer is freed after the last operation
    that reads it before it is created again; buffers that the forward or the step must leave behind
    are kept from their last creation.

    Args:
        graph: the step.
        order: ids of operations.
        num_forward: how many of them run in the forward.
        in_place: let operations overwrite inputs that die with them where the graph says they may.
    """
    operations = graph.operations
    resident = [b.id in graph.resident for b in graph.buffers]
    until_forward_ends = set(graph.forward_outputs)
    until_step_ends = set(graph.outputs)
    # Walk backwards: `wanted` holds the buffers that are read (or returned) later on.
    wanted = set(until_step_ends)
    dies_after: list[list[int]] = [[] for _ in order]
    dies_with_forward: list[int] = []
    for position in range(len(order) - 1, -1, -1):
        if position == num_forward - 1:
            dies_with_forward = sorted(until_forward_ends - wanted)
            wanted.update(dies_with_forward)
        operation = operations[order[position]]
        for buffer in operation.creates:
            if buffer in wanted:
                wanted.discard(buffer)
            else:
                dies_after[position].append(buffer)
        for buffer in operation.reads:
            if not resident[buffer] and buffer not in wanted:
                wanted.add(buffer)
                dies_after[position].append(buffer)
    instructions: list[Instruction] = []
    forward_length = 0
    for position, index in enumerate(order):
        dead = dies_after[position]
        overwrite: tuple[int, int] | None = None
        if in_place:
            possible = [pair for pair in operations[index].overwrites if pair[1] in dead]
            overwrite = max(possible, key=lambda pair: graph.buffers[pair[0]].bytes, default=None)
        instructions.append(Instruction(Action.RUN, index, overwrite))
        for buffer in dead:
            if overwrite is None or buffer != overwrite[1]:
                instructions.append(Instruction(Action.FREE, buffer))
        if position == num_forward - 1:
            forward_length = len(instructions)
            instructions.extend(Instruction(Action.FREE, b) for b in dies_with_forward)
    return Schedule(tuple(instructions), forward_length)


def without_useless_runs(graph: StepGraph, order: Sequence[int]) -> list[int]:
    """Return an order without the recomputations of which nothing is read later."""
    first_run: dict[int, int] = {}
    for position, index in enumerate(order):
        first_run.setdefault(index, position)
    wanted = set(graph.outputs)
    kept: list[int] = []
    for position in range(len(order) - 1, -1, -1):
        operation = graph.operations[order[position]]
        is_first = first_run[operation.id] == position
        if is_first and operation.id == graph.num_forward - 1:
            wanted.update(graph.forward_outputs)
        if is_first or wanted.intersection(operation.creates):
            wanted.difference_update(operation.creates)
            wanted.update(operation.reads)
            kept.append(order[position])
    return kept[::-1]
