"""The plain step as a schedule: every operation once, every buffer freed at its last use."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.step import Action, Instruction, Schedule, StepGraph


def plain_schedule(graph: StepGraph) -> Schedule:
    """Return the schedule of the plain step: everything kept, freed at last use, in place where possible."""
    return schedule_from_order(graph, [o.id for o in graph.operations], graph.num_forward)


def schedule_from_order(
    graph: StepGraph, order: Sequence[int], num_forward: int, in_place: bool = True
) -> Schedule:
    """Return the schedule that runs operations in an order and frees every buffer as early as it can.

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
    resident = [b.kind.is_resident for b in graph.buffers]
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
        overwrite = None
        if in_place:
            for pair in operations[index].overwrites:
                if pair[1] in dead and pair[0] not in dead:
                    overwrite = pair
                    break
        instructions.append(Instruction(Action.COMPUTE, index, overwrite))
        for buffer in dead:
            if overwrite is None or buffer != overwrite[1]:
                instructions.append(Instruction(Action.FREE, buffer))
        if position == num_forward - 1:
            forward_length = len(instructions)
            instructions.extend(Instruction(Action.FREE, b) for b in dies_with_forward)
    return Schedule(tuple(instructions), forward_length)
