"""How schedules with transfers were judged when there was one link: the oracle for one lane.

Transfers were instructions then: OFFLOAD b wrote a buffer to the far tier, FETCH b read it back,
one after the other on one link. What this model said of peaks and seconds is what `simulate` must
say of the same schedule in today's words (`translated`), where there is one lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from packlight.step import Action, Instruction, Machine, OperationKind, Schedule, StepGraph

COMPUTE, FREE, OFFLOAD, FETCH = "compute", "free", "offload", "fetch"


class OldInstruction(NamedTuple):
    """An instruction of then; the target of OFFLOAD and FETCH is a buffer."""

    action: str
    target: int
    overwrite: tuple[int, int] | None = None


@dataclass(frozen=True)
class OldSchedule:
    """A schedule of then."""

    instructions: tuple[OldInstruction, ...]
    num_forward: int


class Verdict(NamedTuple):
    """What the model of then said."""

    live_bytes: tuple[int, ...]
    peak_bytes: int
    peak_index: int
    peak_buffers: frozenset[int]
    seconds: float
    link_seconds: float
    wait_seconds: float
    done_seconds: tuple[float, ...]


def translated(graph: StepGraph, old: OldSchedule) -> Schedule:
    """Return a schedule of then in the operations of a graph with transfers."""
    writes, reads = {}, {}
    for operation in graph.operations:
        if operation.kind is OperationKind.WRITE:
            writes[operation.reads[0]] = operation.id
        elif operation.kind is OperationKind.READ:
            reads[operation.creates[0]] = operation.id
    new = []
    for action, target, overwrite in old.instructions:
        if action == FREE:
            new.append(Instruction(Action.FREE, target))
        else:
            operation = {COMPUTE: {target: target}, OFFLOAD: writes, FETCH: reads}[action][target]
            new.append(Instruction(Action.RUN, operation, overwrite))
    return Schedule(tuple(new), old.num_forward)


def judged(
    graph: StepGraph, schedule: OldSchedule, machine: Machine, stored: Iterable[int] = ()
) -> Verdict:
    """Return the verdict of then on a valid schedule of a graph of computations."""
    (lane,) = machine.lanes
    assert lane.read is not None and lane.write is not None
    stored = frozenset(stored)
    resident = frozenset(b.id for b in graph.buffers if b.kind.is_resident) - stored
    size = [0 if b.id in resident else b.bytes for b in graph.buffers]
    live = set(resident)
    now = link_free = link_seconds = wait_seconds = 0.0
    written_at: dict[int, float] = {}
    ready_at: dict[int, float] = {}
    live_bytes, peak_bytes, peak_index = 0, 0, 0
    peak_live: frozenset[int] = frozenset()
    timeline: list[int] = []
    done_seconds: list[float] = []

    def wait_until(time: float) -> None:
        nonlocal now, wait_seconds
        if time > now:
            wait_seconds += time - now
            now = time

    def let_go(buffer: int) -> None:
        wait_until(written_at.pop(buffer, 0.0))
        wait_until(ready_at.pop(buffer, 0.0))

    def transfer(seconds: float) -> float:
        nonlocal now, link_free, link_seconds
        link_free = max(link_free, now) + seconds
        link_seconds += seconds
        now += lane.compute_share * seconds
        return link_free

    for index, (action, target, overwrite) in enumerate(schedule.instructions):
        if index == schedule.num_forward:
            for buffer in graph.forward_outputs:
                wait_until(ready_at.pop(buffer, 0.0))
        if action == COMPUTE:
            operation = graph.operations[target]
            before = live_bytes
            for buffer in operation.reads:
                wait_until(ready_at.pop(buffer, 0.0))
            for buffer in operation.mutates:
                let_go(buffer)
            for buffer in operation.creates:
                live.add(buffer)
                live_bytes += size[buffer]
            if overwrite is not None:
                let_go(overwrite[1])
                live_bytes -= size[overwrite[0]]
                live.discard(overwrite[1])
            now += operation.seconds
            during = max(live_bytes + operation.workspace_bytes, before)
            if during > peak_bytes or not timeline:
                peak_bytes, peak_index, peak_live = during, index, frozenset(live - resident)
        elif action == FREE:
            let_go(target)
            live.discard(target)
            live_bytes -= size[target]
        elif action == OFFLOAD:
            written_at[target] = transfer(lane.write.seconds(graph.buffers[target].bytes))
        else:
            ready_at[target] = transfer(lane.read.seconds(graph.buffers[target].bytes))
            live.add(target)
            live_bytes += size[target]
            if live_bytes > peak_bytes:
                peak_bytes, peak_index, peak_live = live_bytes, index, frozenset(live - resident)
        timeline.append(live_bytes)
        done_seconds.append(now)
    wait_until(link_free)
    return Verdict(
        tuple(timeline), peak_bytes, peak_index, peak_live, now, link_seconds, wait_seconds,
        tuple(done_seconds),
    )
