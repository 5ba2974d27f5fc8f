"""The project's only memory model: what a schedule holds in memory and how long it takes.

Everything a solver claims is judged here, and the allocator is measured against it.
"""

from __future__ import annotations

from collections.abc import Iterable

from packlight.errors import ScheduleError
from packlight.step.types import (
    Action,
    Device,
    Instruction,
    Link,
    Schedule,
    StepGraph,
    Timeline,
    Transfer,
)


def simulate(graph: StepGraph, schedule: Schedule, device: Device | None = None) -> Timeline:
    """Return the bytes live after each instruction of a schedule, its peak and its duration.

    While an operation runs, its inputs, everything else that is live, all that it creates and its
    workspace are in memory together. A buffer created into the storage of another one
    (`Instruction.overwrite`) costs nothing and ends the other's life. Resident buffers (parameters,
    inputs, states) are there before the step and are not counted.

    Transfers run beside the operations on `device.links[0]`, one after the other in the order in
    which they are issued:

        OFFLOAD b   writes a live buffer. It stays in memory until its FREE, which waits until it is
                    written; so does whatever overwrites or updates it.
        FETCH b     reads a buffer that was written (or whose write is queued) and is not live. It
                    counts from here on; what reads it waits until it is there, and so does its
                    FREE.

    A copy on the far tier stays valid when the buffer is freed, and when it is computed again (the
    value is the same); an update (`Operation.mutates`) makes it stale. `StepGraph.stored` buffers
    are on the far tier from the start, may be freed whenever their copy there is valid, and must
    all be freed when the step ends.

    Args:
        graph: the step.
        schedule: its instructions.
        device: not needed for schedules without transfers.

    Raises:
        ScheduleError: an operation reads a buffer that is not live, a buffer is freed twice, an
            operation that must run once runs again or never, something reads what was updated
            before, a backward operation runs in the forward, an output is missing when it is due,
            or is not left alone once the forward handed it out, or a transfer has nothing to
            transfer, or an update would be lost.

    Cost: linear in the number of instructions.
    """
    resident = graph.resident
    stored = frozenset(graph.stored)
    size = [0 if b.id in resident else b.bytes for b in graph.buffers]
    live = set(resident)
    lanes = _Lanes(device.links[0] if device is not None and device.links else None, stored)
    live_bytes = 0
    timeline: list[int] = []
    done_seconds: list[float] = []
    peak_bytes, peak_index, peak_workspace = 0, 0, 0
    peak_live: tuple[int, ...] = ()
    ran: set[int] = set()
    mutated: set[int] = set()
    # What the forward handed out belongs to the caller from there on, if it outlives the step.
    handed_out: frozenset[int] = frozenset()
    for index, instruction in enumerate(schedule.instructions):
        target = instruction.target
        if index == schedule.num_forward:
            _require_live(graph.forward_outputs, live, index, "the forward ends without")
            lanes.wait_for(graph.forward_outputs)
            handed_out = frozenset(graph.forward_outputs) & frozenset(graph.outputs) - resident
        if instruction.action is Action.COMPUTE:
            operation = graph.operations[target]
            _require_live(operation.touches, live, index, f"{operation.name} reads")
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
            lanes.wait_for(operation.reads)
            lanes.update(operation.mutates)
            for buffer in operation.creates:
                live.add(buffer)
                live_bytes += size[buffer]
            if instruction.overwrite is not None:
                created, read = _checked_overwrite(instruction, index, graph, live)
                if read in handed_out:
                    raise ScheduleError(index, f"output {read} of the forward is overwritten")
                lanes.let_go(read)
                live_bytes -= size[created]
                live.discard(read)
            lanes.now += operation.seconds
            during = live_bytes + operation.workspace_bytes
            # An operation with no workspace may still hold less at its end than while it runs.
            during = max(during, before)
            if during > peak_bytes or not timeline:
                peak_bytes, peak_index = during, index
                peak_workspace = during - live_bytes
                peak_live = tuple(live - resident)
        elif instruction.action is Action.FREE:
            if target not in live or target in resident:
                raise ScheduleError(index, f"buffer {target} is freed but not live")
            if target in handed_out:
                raise ScheduleError(index, f"output {target} of the forward is freed")
            if target in stored and target not in lanes.far:
                raise ScheduleError(index, f"buffer {target} is freed, its update not written")
            lanes.let_go(target)
            live.discard(target)
            live_bytes -= size[target]
        elif instruction.action is Action.OFFLOAD:
            if target in resident:
                raise ScheduleError(index, f"resident buffer {target} is offloaded")
            if target not in live:
                raise ScheduleError(index, f"buffer {target} is offloaded but not live")
            lanes.offload(graph.buffers[target].bytes, target, index)
        elif instruction.action is Action.FETCH:
            if target in live:
                raise ScheduleError(index, f"buffer {target} is fetched but in memory already")
            lanes.fetch(graph.buffers[target].bytes, target, index)
            live.add(target)
            live_bytes += size[target]
            if live_bytes > peak_bytes:
                peak_bytes, peak_index, peak_workspace = live_bytes, index, 0
                peak_live = tuple(live - resident)
        else:
            raise ScheduleError(index, f"{instruction.action} is not simulated")
        timeline.append(live_bytes)
        done_seconds.append(lanes.now)
    end = len(timeline)
    if schedule.num_forward >= end:
        _require_live(graph.forward_outputs, live, end, "the forward ends without")
    _require_live(graph.outputs, live, end, "the step ends without")
    for operation in graph.operations:
        if operation.id not in ran and not operation.can_recompute:
            raise ScheduleError(end, f"{operation.name} never runs")
    if unwritten := sorted(stored - lanes.far):
        raise ScheduleError(end, f"the step ends with updates of {unwritten} not written")
    if left := sorted(stored & live):
        raise ScheduleError(end, f"the step ends with stored buffers {left} in memory")
    lanes.wait_until(lanes.link_free)
    return Timeline(
        live_bytes=tuple(timeline),
        peak_bytes=peak_bytes,
        peak_index=peak_index,
        seconds=lanes.now,
        peak_buffers=tuple(sorted(peak_live, key=lambda b: (-size[b], b))),
        peak_workspace_bytes=peak_workspace,
        link_seconds=lanes.link_seconds,
        wait_seconds=lanes.wait_seconds,
        done_seconds=tuple(done_seconds),
        transfers=tuple(lanes.transfers),
    )


class _Lanes:
    """The clocks of the compute lane and of the link, and what lies on the far tier.

    Attributes:
        far: buffers with a valid copy there, written or queued to be.
        now: when the compute lane has done what was issued so far.
        link_free: when the link has.
        link_seconds, wait_seconds: how long the link worked, how long the compute lane waited.
        transfers: what the link worked on.
    """

    def __init__(self, link: Link | None, stored: Iterable[int]) -> None:
        self.link = link
        self.far = set(stored)
        self.now = self.link_free = 0.0
        self.link_seconds = self.wait_seconds = 0.0
        self.transfers: list[Transfer] = []
        self._written_at: dict[int, float] = {}
        self._ready_at: dict[int, float] = {}

    def offload(self, num_bytes: int, buffer: int, index: int) -> None:
        if buffer in self.far:
            raise ScheduleError(index, f"buffer {buffer} is offloaded but on the far tier already")
        self.far.add(buffer)
        link = self._link_for(Action.OFFLOAD, index)
        self._written_at[buffer] = self._run(
            Action.OFFLOAD, buffer, link.write_seconds(num_bytes)
        )

    def fetch(self, num_bytes: int, buffer: int, index: int) -> None:
        link = self._link_for(Action.FETCH, index)
        if buffer not in self.far:
            raise ScheduleError(index, f"buffer {buffer} is fetched but not on the far tier")
        self._ready_at[buffer] = self._run(Action.FETCH, buffer, link.read_seconds(num_bytes))

    def _link_for(self, action: Action, index: int) -> Link:
        if self.link is None:
            raise ScheduleError(index, f"{action} is not simulated without a device with a link")
        return self.link

    def _run(self, action: Action, buffer: int, seconds: float) -> float:
        assert self.link is not None
        start = max(self.link_free, self.now)
        self.link_free = start + seconds
        self.transfers.append(Transfer(action, buffer, start, self.link_free))
        self.link_seconds += seconds
        self.now += self.link.compute_share * seconds  # taken from what computes meanwhile
        return self.link_free

    def wait_until(self, time: float) -> None:
        if time > self.now:
            self.wait_seconds += time - self.now
            self.now = time

    def wait_for(self, buffers: Iterable[int]) -> None:
        """Wait until buffers that were fetched are there."""
        if self._ready_at:
            for buffer in buffers:
                self.wait_until(self._ready_at.pop(buffer, 0.0))

    def let_go(self, buffer: int) -> None:
        """Wait until neither a write nor a fetch needs a buffer's memory."""
        self.wait_until(self._written_at.pop(buffer, 0.0))
        self.wait_until(self._ready_at.pop(buffer, 0.0))

    def update(self, buffers: Iterable[int]) -> None:
        """Wait until buffers may change; what lies on the far tier is then stale."""
        for buffer in buffers:
            self.let_go(buffer)
            self.far.discard(buffer)


def _require_live(buffers: tuple[int, ...], live: set[int], index: int, what: str) -> None:
    missing = [b for b in buffers if b not in live]
    if missing:
        raise ScheduleError(index, f"{what} buffers {missing}, which are not in memory")


def _checked_overwrite(
    instruction: Instruction, index: int, graph: StepGraph, live: set[int]
) -> tuple[int, int]:
    assert instruction.overwrite is not None
    operation = graph.operations[instruction.target]
    created, read = instruction.overwrite
    is_resident = graph.buffers[read].kind.is_resident
    if (created, read) not in operation.overwrites or is_resident or read not in live:
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
        elif instruction.action is Action.FETCH:
            live.add(instruction.target)
        elif instruction.action is Action.FREE:
            live.discard(instruction.target)
    return live
