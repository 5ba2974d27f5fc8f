"""The reads and writes that a machine's lanes can do, added to a graph of computations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace

from packlight.step.machine import RANKS, Lane, Machine, Memory
from packlight.step.types import Buffer, BufferKind, Operation, OperationKind, StepGraph


def with_transfers(
    graph: StepGraph,
    machine: Machine,
    resting: Iterable[int] = (),
    in_pieces: Iterable[int] = (),
) -> StepGraph:
    """Return a graph in which buffers may leave the device's memory and come back.

    What computations make gets a copy in every memory of the machine, with a write and a read on
    every lane that reaches it: whoever schedules the step chooses among them. What rests in another
    memory between steps has one place there. Ids of computations and buffers stay what they are.

    Args:
        graph: computations alone.
        machine: without lanes, nothing is added.
        resting: parameters and states that lie in another memory when the step starts and when it
            ends. Where there are several memories, what one operation needs is spread over them,
            and their lanes get about as much work each.
        in_pieces: parameters that rest in pieces with all ranks (`RANKS`), from which they are
            gathered; updates of them are updates of what lies there.

    Raises:
        ValueError: something cannot rest elsewhere, or there is no room for it.
    """
    in_pieces = frozenset(in_pieces)
    resting = list(dict.fromkeys((*resting, *sorted(in_pieces))))
    _check_resting(graph, resting)
    build = _Builder(graph, machine, in_pieces)
    build.find_places(resting)
    made = {
        b for o in graph.operations for b in o.creates
        # Gradients of other ranks' rows do not stay for long, and this rank's are few.
        if o.kind not in (OperationKind.BUCKET, OperationKind.REDUCE, OperationKind.OWN)
    }
    # What is made last comes first: it is also what a backward needs first.
    for buffer in reversed(graph.buffers):
        if buffer.id in build.place_of:
            build.rest(buffer)
        elif buffer.id in made and buffer.bytes > 0:
            build.copy(buffer)
    return replace(
        graph,
        operations=(*build.computations(), *build.operations),
        buffers=(*graph.buffers, *build.buffers),
    )


def _check_resting(graph: StepGraph, resting: Sequence[int]) -> None:
    kinds = (BufferKind.PARAMETER, BufferKind.STATE)
    strange = [
        b for b in resting
        if not 0 <= b < len(graph.buffers) or graph.buffers[b].kind not in kinds
    ]
    if strange:
        raise ValueError(
            f"buffers {strange} cannot rest elsewhere: they are neither parameters nor states"
        )


class _Builder:
    """Collects transfers and the buffers that they make."""

    def __init__(self, graph: StepGraph, machine: Machine, in_pieces: Set[int]) -> None:
        self.graph, self.in_pieces = graph, in_pieces
        self.operations: list[Operation] = []
        self.buffers: list[Buffer] = []
        self.updated = {b for o in graph.operations for b in o.mutates} - in_pieces
        self.lanes = [
            (memory, [lane for lane in machine.lanes if lane.memory == memory.name])
            for memory in machine.memories
        ]
        self.place_of: dict[int, tuple[Memory, list[Lane]]] = {}
        # Of what rests there: seconds of its lanes, and bytes.
        self.load = {memory.name: 0.0 for memory in machine.memories}
        self.held = {memory.name: 0 for memory in machine.memories}

    def find_places(self, resting: Sequence[int]) -> None:
        """Find out where buffers rest, starting with what is used last: by updates, together."""
        left = set(resting)
        for operation in reversed(self.graph.operations):
            together = dict.fromkeys(self.load, 0.0)
            for b in sorted(left.intersection(operation.touches), key=self._size_and_id):
                self._find_place(self.graph.buffers[b], together)
                left.remove(b)
        for b in sorted(left):
            self._find_place(self.graph.buffers[b], dict.fromkeys(self.load, 0.0))

    def _size_and_id(self, buffer: int) -> tuple[int, int]:
        return -self.graph.buffers[buffer].bytes, buffer

    def _find_place(self, buffer: Buffer, together: dict[str, float]) -> None:
        """Find the memory whose lanes have least to do: for one operation, then for all."""
        best: tuple[float, float, Memory, list[Lane]] | None = None
        is_updated = buffer.id in self.updated
        for memory, lanes in self.lanes:
            if (memory.name == RANKS) is not (buffer.id in self.in_pieces):
                continue
            reads = [lane.read.seconds(buffer.bytes) for lane in lanes if lane.read]
            writes = [lane.write.seconds(buffer.bytes) for lane in lanes if lane.write]
            if not reads or (is_updated and not writes):
                continue
            if memory.bytes is not None and self.held[memory.name] + buffer.bytes > memory.bytes:
                continue
            seconds = (min(reads) + (min(writes) if is_updated else 0.0)) / len(lanes)
            then = together[memory.name] + seconds, self.load[memory.name] + seconds
            if best is None or then < best[:2]:
                best = (*then, memory, lanes)
        if best is None:
            raise ValueError(
                f"nowhere for {buffer.name or buffer.id} ({buffer.bytes} bytes) to rest: no lane "
                "of the machine reaches a memory with room for it"
            )
        together[best[2].name], self.load[best[2].name] = best[:2]
        self.held[best[2].name] += buffer.bytes
        self.place_of[buffer.id] = best[2:]

    def computations(self) -> Iterator[Operation]:
        """Yield the computations: those that update what rests in pieces, update it there."""
        there = {
            o.creates[0]: o.reads[0] for o in self.operations
            if o.kind is OperationKind.READ and o.creates[0] in self.in_pieces
        }
        for operation in self.graph.operations:
            if operation.mutates and not there.keys().isdisjoint(operation.mutates):
                operation = replace(
                    operation,
                    reads=tuple(b for b in operation.reads if b not in there),
                    mutates=tuple(there.get(b, b) for b in operation.mutates),
                )
            yield operation

    def rest(self, buffer: Buffer) -> None:
        """Add what moves a buffer that rests elsewhere."""
        memory, lanes = self.place_of[buffer.id]
        there = self._buffer(buffer, buffer.kind, memory)
        self._add(lanes, OperationKind.READ, there, creates=buffer.id)
        if buffer.id in self.updated:
            self._add(lanes, OperationKind.WRITE, buffer.id, mutates=there)

    def copy(self, buffer: Buffer) -> None:
        """Let a buffer be written to and read from every memory that can do both."""
        for memory, lanes in self.lanes:
            if any(lane.read for lane in lanes) and any(lane.write for lane in lanes):
                there = self._buffer(buffer, BufferKind.ACTIVATION, memory)
                self._add(lanes, OperationKind.WRITE, buffer.id, creates=there)
                self._add(lanes, OperationKind.READ, there, creates=buffer.id)

    def _buffer(self, of: Buffer, kind: BufferKind, memory: Memory) -> int:
        new = len(self.graph.buffers) + len(self.buffers)
        self.buffers.append(Buffer(new, of.bytes, kind, of.name, memory.name))
        return new

    def _add(
        self, lanes: list[Lane], kind: OperationKind, source: int,
        creates: int | None = None, mutates: int | None = None,
    ) -> None:
        num_bytes = self.buffers[-1].bytes
        for lane in lanes:
            speed = lane.read if kind is OperationKind.READ else lane.write
            if speed is None:
                continue
            self.operations.append(
                Operation(
                    len(self.graph.operations) + len(self.operations),
                    f"packlight.{kind}",
                    (source,),
                    () if creates is None else (creates,),
                    speed.seconds(num_bytes),
                    mutates=() if mutates is None else (mutates,),
                    kind=kind,
                    lane=lane.name,
                )
            )
