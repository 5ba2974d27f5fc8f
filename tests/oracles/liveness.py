"""From the bare order in which operations run to a whole schedule, and back to bytes.

Both directions are written from the rules alone and share nothing with `packlight`: the oracles
must not inherit a mistake of the code that they judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from packlight.step import Action, Instruction, Machine, OperationKind, Schedule, StepGraph


def schedule_from_order(
    graph: StepGraph, order: Sequence[int], num_forward: int, *, in_place: bool = True
) -> Schedule:
    """Return the schedule that runs `order` and holds every buffer exactly as long as needed.

    A buffer is needed from its creation to its last read before it is created anew; the end of the
    forward reads `forward_outputs` and the end of the step reads `outputs`.

    Args:
        graph: the step.
        order: operation ids, repetitions included.
        num_forward: how many of them run in the forward.
        in_place: use `Operation.overwrites` wherever the overwritten buffer is not needed any more.
    """
    resident = {b.id for b in graph.buffers if b.kind.is_resident}
    reads_at: list[tuple[int, ...]] = [graph.operations[op].reads for op in order]
    # The two ends of phases are readers too; they get positions of their own.
    events: list[tuple[tuple[int, ...], tuple[int, ...], int | None]] = []
    for position, op in enumerate(order):
        if position == num_forward:
            events.append((graph.forward_outputs, (), None))
        events.append((reads_at[position], graph.operations[op].creates, op))
    if num_forward >= len(order):
        events.append((graph.forward_outputs, (), None))
    events.append((graph.outputs, (), None))

    dies_at: list[list[int]] = [[] for _ in events]
    needed: set[int] = set()
    for index in range(len(events) - 1, -1, -1):
        reads, creates, _ = events[index]
        for buffer in creates:
            if buffer not in needed:
                dies_at[index].append(buffer)
            needed.discard(buffer)
        for buffer in dict.fromkeys(reads):
            if buffer not in needed and buffer not in resident:
                dies_at[index].append(buffer)
                needed.add(buffer)

    instructions: list[Instruction] = []
    first_backward: int | None = None
    for index, (_, _, runs) in enumerate(events):
        dying = dies_at[index]
        if runs is None:
            if first_backward is None:
                first_backward = len(instructions)
                instructions += [Instruction(Action.FREE, b) for b in dying]
            continue
        pair = _best_overwrite(graph, runs, dying) if in_place else None
        instructions.append(Instruction(Action.RUN, runs, pair))
        instructions += [
            Instruction(Action.FREE, b) for b in dying if pair is None or b != pair[1]
        ]
    assert first_backward is not None
    return Schedule(tuple(instructions), first_backward)


def _best_overwrite(graph: StepGraph, op: int, dying: list[int]) -> tuple[int, int] | None:
    possible = [pair for pair in graph.operations[op].overwrites if pair[1] in dying]
    return max(possible, key=lambda pair: graph.buffers[pair[0]].bytes, default=None)


def plain_order(graph: StepGraph) -> Schedule:
    """Return the schedule that runs every operation once, in the order of the graph."""
    return schedule_from_order(graph, range(len(graph.operations)), graph.num_forward)


def recount_peak_bytes(graph: StepGraph, instructions: Iterable[Instruction]) -> int:
    """Return the peak of valid instructions, adding up every live buffer anew at every moment.

    Quadratic on purpose: no running total that could drift. A buffer is the set of its storage's
    names, so that one which took over another's storage is still one storage. What lies in other
    memories does not count; a parameter or state that a read makes does.
    """
    made = {b for o in graph.operations for b in o.creates}
    uncounted = {b.id for b in graph.buffers if b.memory or b.id not in made}
    live: set[int] = set()
    peak_bytes = 0
    for instruction in instructions:
        if instruction.action is Action.FREE:
            live.remove(instruction.target)
            continue
        operation = graph.operations[instruction.target]
        assert live.isdisjoint(operation.creates)
        if operation.kind is OperationKind.WRITE:
            assert live.issuperset(operation.reads)
        held = set(live) | set(operation.creates)
        if instruction.overwrite is not None:
            # One storage under two names: the read one goes, the created one stays.
            held.remove(instruction.overwrite[1])
            live.remove(instruction.overwrite[1])
        now_bytes = operation.workspace_bytes
        for buffer in held - uncounted:
            now_bytes += graph.buffers[buffer].bytes
        peak_bytes = max(peak_bytes, now_bytes)
        live |= set(operation.creates)
    return peak_bytes


def recount_seconds(graph: StepGraph, schedule: Schedule, machine: Machine) -> float:
    """Return the duration of a valid schedule with transfers, from when each thing can start.

    Not a simulation: every instruction is a node that ends `duration` after the last of the nodes
    that it must come after, and the step's duration is the longest path. Computations, frees and
    the issuing of transfers come after one another; a transfer comes after the one before on its
    lane and after those that made what it reads; what touches a buffer comes after the transfers
    of it.
    """
    shares = {lane.name: lane.compute_share for lane in machine.lanes}
    ends: list[float] = []  # of every instruction's effect
    handed_on = 0.0  # when the instruction before handed on
    latest_on: dict[str, float] = {}
    made_by: dict[int, float] = {}  # transfers
    read_by: dict[int, float] = {}
    for index, instruction in enumerate(schedule.instructions):
        if index == schedule.num_forward:
            due = [made_by[b] for b in graph.forward_outputs if b in made_by]
            handed_on = max(handed_on, *due, 0.0)
        after = [handed_on]
        if instruction.action is Action.FREE:
            after += [at[instruction.target] for at in (made_by, read_by)
                      if instruction.target in at]
            handed_on = max(after)
            ends.append(handed_on)
            continue
        operation = graph.operations[instruction.target]
        after += [made_by[b] for b in operation.touches if b in made_by]
        gone = operation.mutates
        if instruction.overwrite is not None:
            gone += (instruction.overwrite[1],)
        after += [read_by[b] for b in gone if b in read_by]
        if not operation.lane:
            handed_on = max(after) + operation.seconds
            ends.append(handed_on)
            continue
        end = max(*after, latest_on.get(operation.lane, 0.0)) + operation.seconds
        latest_on[operation.lane] = end
        ends.append(end)
        made_by |= dict.fromkeys((*operation.creates, *operation.mutates), end)
        read_by |= {b: max(end, read_by.get(b, 0.0)) for b in operation.reads}
        handed_on += shares[operation.lane] * operation.seconds
    return max([0.0, *ends])
