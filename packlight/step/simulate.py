"""The project's only memory model: what a schedule holds in memory and how long it takes.

Everything a solver claims is judged here, and the allocator is measured against it.
"""

from __future__ import annotations

from packlight.errors import ScheduleError
from packlight.step.types import Action, Device, Instruction, Schedule, StepGraph, Timeline


def simulate(graph: StepGraph, schedule: Schedule, device: Device | None = None) -> Timeline:
    """Return the bytes live after each instruction of a schedule, its peak and its duration.

    While an operation runs, its inputs, everything else that is live, all that it creates and its
    workspace are in memory together. A buffer created into the storage of another one
    (`Instruction.overwrite`) costs nothing and ends the other's life. Resident buffers (parameters,
    inputs, states) are there before the step and are not counted.

    Args:
        graph: the step.
        schedule: its instructions.
        device: not needed for schedules without transfers.

    Raises:
        ScheduleError: an operation reads a buffer that is not live, a buffer is freed twice, an
            operation that must run once runs again or never, something reads what was updated
            before, a backward operation runs in the forward, or an output is missing when it is
            due, or is not left alone once the forward handed it out.

    Cost: linear in the number of instructions.
    """
    size = [0 if b.kind.is_resident else b.bytes for b in graph.buffers]
    live = {b.id for b in graph.buffers if b.kind.is_resident}
    resident = frozenset(live)
    live_bytes = 0
    timeline: list[int] = []
    peak_bytes, peak_index, peak_workspace = 0, 0, 0
    peak_live: tuple[int, ...] = ()
    seconds = 0.0
    ran: set[int] = set()
    mutated: set[int] = set()
    # What the forward handed out belongs to the caller from there on, if it outlives the step.
    handed_out: frozenset[int] = frozenset()
    for index, instruction in enumerate(schedule.instructions):
        if index == schedule.num_forward:
            _require_live(graph.forward_outputs, live, index, "the forward ends without")
            handed_out = frozenset(graph.forward_outputs) & frozenset(graph.outputs) - resident
        if instruction.action is Action.COMPUTE:
            operation = graph.operations[instruction.target]
            _require_live(operation.reads, live, index, f"{operation.name} reads")
            if operation.id in ran and not operation.can_recompute:
                raise ScheduleError(index, f"{operation.name} must run exactly once")
            if index < schedule.num_forward and operation.id >= graph.num_forward:
                raise ScheduleError(index, f"{operation.name} of the backward runs in the forward")
            late = mutated.intersection(operation.reads)
            if late:
                raise ScheduleError(index, f"{operation.name} reads {sorted(late)} updated before")
            ran.add(operation.id)
            mutated.update(operation.mutates)
            before = live_bytes
            again = [b for b in operation.creates if b in live]
            if again:
                raise ScheduleError(index, f"{operation.name} creates live buffers {again}")
            for buffer in operation.creates:
                live.add(buffer)
                live_bytes += size[buffer]
            if instruction.overwrite is not None:
                created, read = _checked_overwrite(instruction, index, graph, live, resident)
                if read in handed_out:
                    raise ScheduleError(index, f"output {read} of the forward is overwritten")
                live_bytes -= size[created]
                live.discard(read)
            seconds += operation.seconds
            during = live_bytes + operation.workspace_bytes
            # An operation with no workspace may still hold less at its end than while it runs.
            during = max(during, before)
            if during > peak_bytes or not timeline:
                peak_bytes, peak_index = during, index
                peak_workspace = during - live_bytes
                peak_live = tuple(live - resident)
        elif instruction.action is Action.FREE:
            if instruction.target not in live or instruction.target in resident:
                raise ScheduleError(index, f"buffer {instruction.target} is freed but not live")
            if instruction.target in handed_out:
                raise ScheduleError(index, f"output {instruction.target} of the forward is freed")
            live.discard(instruction.target)
            live_bytes -= size[instruction.target]
        else:
            raise ScheduleError(index, f"{instruction.action} is not simulated")
        timeline.append(live_bytes)
    if schedule.num_forward >= len(schedule.instructions):
        _require_live(graph.forward_outputs, live, len(timeline), "the forward ends without")
    _require_live(graph.outputs, live, len(timeline), "the step ends without")
    for operation in graph.operations:
        if operation.id not in ran and not operation.can_recompute:
            raise ScheduleError(len(timeline), f"{operation.name} never runs")
    return Timeline(
        live_bytes=tuple(timeline),
        peak_bytes=peak_bytes,
        peak_index=peak_index,
        seconds=seconds,
        peak_buffers=tuple(sorted(peak_live, key=lambda b: (-size[b], b))),
        peak_workspace_bytes=peak_workspace,
    )


def _require_live(buffers: tuple[int, ...], live: set[int], index: int, what: str) -> None:
    missing = [b for b in buffers if b not in live]
    if missing:
        raise ScheduleError(index, f"{what} buffers {missing}, which are not in memory")


def _checked_overwrite(
    instruction: Instruction, index: int, graph: StepGraph, live: set[int], resident: frozenset[int]
) -> tuple[int, int]:
    assert instruction.overwrite is not None
    operation = graph.operations[instruction.target]
    created, read = instruction.overwrite
    if (created, read) not in operation.overwrites or read in resident or read not in live:
        raise ScheduleError(index, f"{operation.name} cannot overwrite buffer {read}")
    return created, read


def live_after_forward(graph: StepGraph, schedule: Schedule) -> set[int]:
    """Return the buffers, resident ones left out, in memory when the forward ends."""
    live: set[int] = set()
    for instruction in schedule.instructions[: schedule.num_forward]:
        if instruction.action is Action.COMPUTE:
            live.update(graph.operations[instruction.target].creates)
            if instruction.overwrite is not None:
                live.discard(instruction.overwrite[1])
        elif instruction.action is Action.FREE:
            live.discard(instruction.target)
    return live
