"""The ways out of memory and back that the transfers of a graph offer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from packlight.step import Machine, Operation, OperationKind, StepGraph, Timeline


@dataclass(frozen=True, slots=True)
class Route:
    """One way of a buffer out of memory and back.

    Attributes:
        write: copies it to another memory, or brings what rests there up to date; None where
            nothing ever does.
        read: brings it back.
        memory: where it then is.
        rests: it lies there before the step, and need not be written first.
    """

    write: Operation | None
    read: Operation
    memory: str
    rests: bool

    @property
    def seconds(self) -> float:
        """How long lanes work for one absence of the buffer."""
        if self.rests or self.write is None:
            return self.read.seconds
        return self.write.seconds + self.read.seconds

    def seconds_on(self, lane: str) -> float:
        """Return what of that is one lane's, a write included."""
        transfers = (self.write, self.read)
        return sum(o.seconds for o in transfers if o is not None and o.lane == lane)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Where it goes: out and back."""
        out = () if self.write is None else (self.write.lane,)
        return (*out, self.read.lane)


def routes_of(graph: StepGraph) -> dict[int, tuple[Route, ...]]:
    """Return the routes of every buffer that can leave the device's memory."""
    writes: dict[int, list[Operation | None]] = {}
    for operation in graph.transfers:
        if operation.kind is OperationKind.WRITE:
            (there,) = (*operation.creates, *operation.mutates)
            writes.setdefault(there, []).append(operation)
    found: dict[int, tuple[Route, ...]] = {}
    for buffer in {b for o in graph.transfers for b in o.creates if not graph.buffers[b].memory}:
        found[buffer] = tuple(
            Route(write, read, graph.buffers[read.reads[0]].memory, buffer in graph.resting)
            for read in graph.makers(buffer) if read.kind is OperationKind.READ
            for write in writes.get(read.reads[0], [None])
        )
    return dict(sorted(found.items()))


class Routes:
    """The routes of every buffer of a graph on a machine.

    Attributes:
        of: buffer -> its routes, none for those that cannot leave.
        resting: the buffers that rest in another memory.
        share: lane -> what its work takes from computation.
        lanes: the ones that there are routes on.
        room: memory -> bytes for what does not rest there, where there is a limit.
        brings: for each transfer of the graph, what it brings to the device, if anything.
        transfer_seconds: for each, how long all lanes together work for an absence of that.
    """

    def __init__(self, graph: StepGraph, machine: Machine) -> None:
        self.of = routes_of(graph)
        self.resting = frozenset(graph.resting)
        self.share = {lane.name: lane.compute_share for lane in machine.lanes}
        used = {lane for routes in self.of.values() for route in routes for lane in route.lanes}
        self.lanes = [lane.name for lane in machine.lanes if lane.name in used]
        self._seconds = {
            buffer: statistics.harmonic_mean([r.seconds for r in routes]) / len(self.lanes)
            for buffer, routes in self.of.items()
        }
        self.brings = [tuple(b for b in o.creates if b in self.of) for o in graph.transfers]
        self.transfer_seconds = [sum(self._seconds[b] for b in bs) for bs in self.brings]
        self._limits = {m.name: m.bytes for m in machine.memories if m.bytes is not None}
        self.room = dict(self._limits)
        for there in graph.resting.values():
            buffer = graph.buffers[there]
            if buffer.memory in self.room:
                self.room[buffer.memory] -= buffer.bytes

    def read(self, buffer: int) -> Operation:
        """Return one of the reads that bring a buffer back, standing for all of them."""
        return self.of[buffer][0].read

    def seconds(self, buffer: int) -> float:
        """Return how long all lanes together work for one absence of a buffer."""
        return self._seconds[buffer]

    def price(self, of_waiting: float) -> float:
        """Return what a second of all lanes costs: what they take from computing, and waiting."""
        share = min(1.0, sum(self.share[lane] for lane in self.lanes))
        return share + (1 - share) * of_waiting

    def overflow(self, timeline: Timeline) -> bool:
        """Whether a schedule leaves more in another memory than fits there."""
        return any(most > self._limits.get(name, most) for name, most in timeline.far_peak_bytes)
