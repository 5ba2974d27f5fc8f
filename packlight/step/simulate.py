"""The project's only memory model: what a schedule holds in memory and how long it takes.

Everything a solver claims is judged here, and the allocator is measured against it.
"""

from __future__ import annotations

from collections.abc import Iterable

from packlight.errors import ScheduleError
from packlight.step.machine import Machine
from packlight.step.schedule import (
    Action,
    Instruction,
    LaneRun,
    LaneTimeline,
    Schedule,
    Timeline,
)
from packlight.step.types import Operation, OperationKind, StepGraph


def simulate(graph: StepGraph, schedule: Schedule, machine: Machine | None = None) -> Timeline:
    """Return the bytes live after each instruction of a schedule, its peak and its duration.

    While an operation runs, its inputs, everything else that is live, all that it creates and its
    workspace are in memory together. A buffer created into the storage of another one
    (`Instruction.overwrite`) costs nothing and ends the other's life. Resident buffers (parameters,
    inputs, states) are there before the step and are not counted.

    An operation on another lane is issued where its instruction stands. The lane works through its
    operations in that order, beside computation and beside other lanes; each starts when it is
    issued, the lane is free, and its input is there. From its issue on, what it creates counts;
    until its end

        what it reads stays: a FREE of it waits, and so does whatever overwrites or updates it
        who reads what it creates waits, and so does a FREE of that

    A reduction works in the same way; its workspace is held where it is issued.

    A copy in another memory stays valid when its buffer is freed, and when that is computed again
    (the value is the same). What rests in another memory (`StepGraph.resting`) is there when the
    step starts. An update of it makes that copy stale until it is written again: before, the buffer
    cannot be freed. At the end, all of it must be written and freed.

    Args:
        graph: the step.
        schedule: its instructions.
        machine: not needed for schedules without transfers.

    Raises:
        ScheduleError: an operation reads a buffer that is not live, a buffer is freed twice, an
            operation that must run once runs again or never, something reads what was updated
            before, a backward operation runs in the forward, an output is missing when it is due,
            or is not left alone once the forward handed it out, a lane is missing, a transfer has
            nothing to transfer, or an update would be lost.

    Cost: linear in the number of instructions.
    """
    run = _Run(graph, machine)
    for index, instruction in enumerate(schedule.instructions):
        if index == schedule.num_forward:
            run.end_forward(index)
        if instruction.action is Action.FREE:
            run.free(index, instruction.target)
        else:
            operation = graph.operations[instruction.target]
            if operation.kind.is_transfer:
                run.hand_over(index, operation)
            else:
                is_forward = index < schedule.num_forward
                run.compute(index, operation, instruction, is_forward)
        run.live_bytes.append(run.held)
        run.done_seconds.append(run.clocks.now)
    run.end(schedule)
    return run.timeline(schedule)


class _Run:
    """What is in memory while a schedule runs."""

    def __init__(self, graph: StepGraph, machine: Machine | None) -> None:
        self.graph = graph
        self.resident = graph.resident
        self.size = [0 if b.memory or b.id in self.resident else b.bytes for b in graph.buffers]
        self.clocks = _Clocks(machine)
        self.live = {b.id for b in graph.buffers if b.kind.is_resident}
        self.live.difference_update(graph.resting)
        self.held = 0
        self.held_elsewhere = {m.name: 0 for m in machine.memories} if machine is not None else {}
        self.most_elsewhere = dict(self.held_elsewhere)
        if graph.transfers:
            self._count_elsewhere([b for b in self.live if graph.buffers[b].memory], 1)
        self.live_bytes: list[int] = []
        self.done_seconds: list[float] = []
        self.peak_bytes, self.peak_index, self.peak_workspace = 0, 0, 0
        self.ran: set[int] = set()
        self.mutated: set[int] = set()
        # What rests elsewhere and is newer here than there.
        self.unwritten: set[int] = set()
        # What the forward handed out belongs to the caller from there on, if it outlives the step.
        self.handed_out: frozenset[int] = frozenset()

    def end_forward(self, index: int) -> None:
        """Check that the forward leaves its outputs."""
        outputs = self.graph.forward_outputs
        self._require_live(outputs, index, "the forward ends without")
        self.clocks.wait_for(outputs)
        self.handed_out = frozenset(outputs) & frozenset(self.graph.outputs) - self.resident

    def compute(
        self, index: int, operation: Operation, instruction: Instruction, is_forward: bool
    ) -> None:
        """Run a computation."""
        live, clocks = self.live, self.clocks
        self._require_live(operation.touches, index, f"{operation.name} reads")
        if operation.id in self.ran and not operation.can_recompute:
            raise ScheduleError(index, f"{operation.name} must run exactly once")
        if is_forward and operation.id >= self.graph.num_forward:
            raise ScheduleError(index, f"{operation.name} of the backward runs in the forward")
        if self.mutated and not self.mutated.isdisjoint(operation.reads):
            late = sorted(self.mutated.intersection(operation.reads))
            raise ScheduleError(index, f"{operation.name} reads {late} updated before")
        self.ran.add(operation.id)
        makers = self.graph.makers
        clocks.wait_for(
            b for b in operation.reads  # what its own lane makes, it finds there
            if not operation.lane or all(o.lane != operation.lane for o in makers(b))
        )
        for buffer in operation.mutates:
            clocks.let_go(buffer)
            self.mutated.add(buffer)
            if buffer in self.graph.gathered_from:
                self.mutated.add(self.graph.gathered_from[buffer])
            if buffer in self.graph.resting:
                self.unwritten.add(buffer)
        before = self.held
        self._create(operation, index)
        if instruction.overwrite is not None:
            created, read = self._checked_overwrite(instruction, index)
            clocks.let_go(read)
            self.held -= self.size[created]
            live.discard(read)
        if operation.lane:
            clocks.hand_over(operation, index)
            if instruction.overwrite is not None:
                clocks.forget(instruction.overwrite[1])
        else:
            clocks.now += operation.seconds
        # An operation with no workspace may still hold less at its end than while it runs.
        self._see(index, max(self.held + operation.workspace_bytes, before))

    def hand_over(self, index: int, operation: Operation) -> None:
        """Hand an operation to another lane."""
        self._require_live(operation.touches, index, f"{operation.name} reads")
        if operation.kind is OperationKind.WRITE and operation.mutates:
            (buffer,) = operation.reads
            if buffer not in self.unwritten:
                raise ScheduleError(index, f"buffer {buffer} is written but up to date there")
            self.unwritten.discard(buffer)
        elif operation.kind is OperationKind.READ and operation.creates[0] in self.unwritten:
            buffer = operation.creates[0]
            raise ScheduleError(index, f"buffer {buffer} is read, its update not written")
        elif self.mutated and operation.reads[0] in self.mutated:
            (buffer,) = operation.creates
            raise ScheduleError(index, f"buffer {buffer} is gathered after its update")
        self._create(operation, index)
        self.clocks.hand_over(operation, index)
        if self.held_elsewhere:
            self._count_elsewhere(operation.creates, 1)
        self._see(index, self.held)

    def free(self, index: int, buffer: int) -> None:
        """Free a buffer in any memory."""
        if buffer not in self.live or buffer in self.resident:
            raise ScheduleError(index, f"buffer {buffer} is freed but not live")
        if buffer in self.handed_out:
            raise ScheduleError(index, f"output {buffer} of the forward is freed")
        if buffer in self.unwritten:
            raise ScheduleError(index, f"buffer {buffer} is freed, its update not written")
        if self.graph.buffers[buffer].bytes:  # else there is no memory to wait for
            self.clocks.let_go(buffer)
        self.live.discard(buffer)
        self.held -= self.size[buffer]
        if self.graph.buffers[buffer].memory:
            self._count_elsewhere((buffer,), -1)

    def end(self, schedule: Schedule) -> None:
        """Check how the step ends, and wait for all lanes."""
        graph, end = self.graph, len(self.live_bytes)
        if schedule.num_forward >= end:
            self._require_live(graph.forward_outputs, end, "the forward ends without")
        self._require_live(graph.outputs, end, "the step ends without")
        for operation in graph.computations:
            if not operation.can_recompute and operation.id not in self.ran:
                raise ScheduleError(end, f"{operation.name} never runs")
        if self.unwritten:
            what = sorted(self.unwritten)
            raise ScheduleError(end, f"the step ends with updates of {what} not written")
        if left := sorted(self.live.intersection(graph.resting)):
            raise ScheduleError(end, f"the step ends with {left} in memory, which rest elsewhere")
        if gone := sorted({*graph.resting.values()} - self.live):
            raise ScheduleError(end, f"the step ends without what rests elsewhere as {gone}")
        self.clocks.wait_for_all()

    def timeline(self, schedule: Schedule) -> Timeline:
        """Return what was seen."""
        size, clocks = self.size, self.clocks
        at_peak = _live_at(self.graph, schedule, self.peak_index) if self.live_bytes else set()
        return Timeline(
            live_bytes=tuple(self.live_bytes),
            peak_bytes=self.peak_bytes,
            peak_index=self.peak_index,
            seconds=clocks.now,
            peak_buffers=tuple(sorted(at_peak, key=lambda b: (-size[b], b))),
            peak_workspace_bytes=self.peak_workspace,
            wait_seconds=clocks.wait_seconds,
            done_seconds=tuple(self.done_seconds),
            lanes=clocks.lanes(),
            far_peak_bytes=tuple(self.most_elsewhere.items()),
        )

    # -- what they share

    def _create(self, operation: Operation, index: int) -> None:
        live, size = self.live, self.size
        if not live.isdisjoint(operation.creates):
            again = [b for b in operation.creates if b in live]
            raise ScheduleError(index, f"{operation.name} creates live buffers {again}")
        for buffer in operation.creates:
            live.add(buffer)
            self.held += size[buffer]

    def _see(self, index: int, during: int) -> None:
        if during > self.peak_bytes or not index:
            self.peak_bytes, self.peak_index = during, index
            self.peak_workspace = during - self.held

    def _count_elsewhere(self, buffers: Iterable[int], sign: int) -> None:
        held, most = self.held_elsewhere, self.most_elsewhere
        for buffer in map(self.graph.buffers.__getitem__, buffers):
            if buffer.memory:
                held[buffer.memory] = held.get(buffer.memory, 0) + sign * buffer.bytes
                most[buffer.memory] = max(most.get(buffer.memory, 0), held[buffer.memory])

    def _require_live(self, buffers: tuple[int, ...], index: int, what: str) -> None:
        if not self.live.issuperset(buffers):
            missing = [b for b in buffers if b not in self.live]
            raise ScheduleError(index, f"{what} buffers {missing}, which are not in memory")

    def _checked_overwrite(self, instruction: Instruction, index: int) -> tuple[int, int]:
        assert instruction.overwrite is not None
        operation = self.graph.operations[instruction.target]
        created, read = instruction.overwrite
        is_resident = self.graph.buffers[read].kind.is_resident
        if (created, read) not in operation.overwrites or is_resident or read not in self.live:
            raise ScheduleError(index, f"{operation.name} cannot overwrite buffer {read}")
        if read in self.handed_out:
            raise ScheduleError(index, f"output {read} of the forward is overwritten")
        return created, read


class _Clocks:
    """The clocks of computation and of the lanes beside it.

    Attributes:
        now: when computation has done what was issued so far.
        wait_seconds: how long it waited.
    """

    def __init__(self, machine: Machine | None) -> None:
        self.now = self.wait_seconds = 0.0
        self._lanes = {lane.name: lane for lane in machine.lanes} if machine is not None else {}
        self._free_at = dict.fromkeys(self._lanes, 0.0)
        self._busy_seconds = dict.fromkeys(self._lanes, 0.0)
        self._runs: dict[str, list[LaneRun]] = {name: [] for name in self._lanes}
        self._read_until: dict[int, float] = {}
        self._ready_at: dict[int, float] = {}

    def hand_over(self, operation: Operation, index: int) -> None:
        """Have a lane do an operation as soon as it can."""
        lane = self._lanes.get(operation.lane)
        if lane is None:
            raise ScheduleError(
                index, f"{operation.name} is not simulated without a machine with a lane "
                f"{operation.lane!r}",
            )
        ready_at, read_until, seconds = self._ready_at, self._read_until, operation.seconds
        start = max(self._free_at[lane.name], self.now)
        for buffer in operation.reads:
            start = max(start, ready_at.get(buffer, 0.0))
        for buffer in operation.mutates:
            start = max(start, ready_at.get(buffer, 0.0), read_until.get(buffer, 0.0))
        end = self._free_at[lane.name] = start + seconds
        for buffer in operation.reads:
            read_until[buffer] = max(end, read_until.get(buffer, 0.0))
        for buffer in (*operation.creates, *operation.mutates):
            ready_at[buffer] = end
        self._runs[lane.name].append(LaneRun(operation.id, start, end))
        self._busy_seconds[lane.name] += seconds
        self.now += lane.compute_share * seconds  # taken from what computes meanwhile

    def wait_until(self, time: float) -> None:
        """Have computation do nothing until then."""
        if time > self.now:
            self.wait_seconds += time - self.now
            self.now = time

    def wait_for(self, buffers: Iterable[int]) -> None:
        """Wait until buffers that lanes make are there."""
        if self._ready_at:
            for buffer in buffers:
                self.wait_until(self._ready_at.pop(buffer, 0.0))

    def let_go(self, buffer: int) -> None:
        """Wait until no lane needs a buffer's memory."""
        if self._read_until or self._ready_at:
            self.wait_until(self._read_until.pop(buffer, 0.0))
            self.wait_until(self._ready_at.pop(buffer, 0.0))

    def forget(self, buffer: int) -> None:
        """Note that a buffer is not there any more, its memory being another one's."""
        self._read_until.pop(buffer, None)

    def wait_for_all(self) -> None:
        """Wait until all lanes are done."""
        self.wait_until(max(self._free_at.values(), default=0.0))

    def lanes(self) -> tuple[LaneTimeline, ...]:
        """Return what each lane did."""
        return tuple(
            LaneTimeline(name, tuple(runs), self._busy_seconds[name])
            for name, runs in self._runs.items()
        )


def _live_at(graph: StepGraph, schedule: Schedule, index: int) -> set[int]:
    """Return what is in the device's memory while an instruction runs, resident buffers left out.

    A buffer that an instruction frees is not.
    """
    live: set[int] = set()
    for instruction in schedule.instructions[: index + 1]:
        if instruction.action is Action.FREE:
            live.discard(instruction.target)
        else:
            live.update(graph.operations[instruction.target].creates)
            if instruction.overwrite is not None:
                live.discard(instruction.overwrite[1])
    return {b for b in live if not graph.buffers[b].memory} if graph.transfers else live


def live_after_forward(graph: StepGraph, schedule: Schedule) -> set[int]:
    """Return the buffers, resident ones left out, in memory when the forward ends."""
    return _live_at(graph, schedule, schedule.num_forward - 1)
