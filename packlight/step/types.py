"""One training step as data: what is computed, what it leaves in memory, and in which order.

A `StepGraph` says what must be computed. A `Schedule` says when, how often, and when each buffer is
freed. A `Timeline` is what a schedule costs, and a `Plan` is a schedule that somebody chose.
All are frozen and free of torch, so planners and tests can run where torch is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from packlight.units import format_bytes, format_seconds


class BufferKind(StrEnum):
    """What a storage holds."""

    PARAMETER = "parameter"
    INPUT = "input"
    STATE = "state"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    OUTPUT = "output"

    @property
    def is_resident(self) -> bool:
        """Whether it is there before the step: in memory, or on a far tier if it is `stored`."""
        return self in (BufferKind.PARAMETER, BufferKind.INPUT, BufferKind.STATE)


class Phase(StrEnum):
    """The part of the step that an operation belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


class Action(StrEnum):
    """What an instruction does."""

    COMPUTE = "compute"
    FREE = "free"
    OFFLOAD = "offload"
    FETCH = "fetch"
    PACK = "pack"
    UPDATE = "update"


class PlanStatus(StrEnum):
    """How good a plan is known to be."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"


@dataclass(frozen=True, slots=True)
class Buffer:
    """One storage. Views are folded into the buffer that they look at.

    Attributes:
        id: position in `StepGraph.buffers`.
        bytes: size of the whole storage.
        kind: what it holds; resident kinds are there before the step (and cost nothing where they
            are in memory throughout, see `StepGraph.resident`).
        name: the name that reports show.
    """

    id: int
    bytes: int
    kind: BufferKind
    name: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that reads buffers and creates buffers.

    Attributes:
        id: position in `StepGraph.operations`, which is also the order of the plain step.
        name: what is called, for reports ("aten.mm.default").
        reads: buffers that must be in memory while it runs.
        creates: buffers that it allocates.
        seconds: duration of one call.
        workspace_bytes: the most that it holds at once beyond what it creates.
        phase: forward, backward or update.
        is_random: draws from a generator; a recomputation replays the generator's state.
        can_recompute: False where it must run exactly once.
        overwrites: pairs (created, read): the created buffer may take over the storage of the read
            one if nobody reads that afterwards (an in-place call with bit-identical results).
        layer: where in the model it comes from, for reports.
        mutates: resident buffers that it gives a new value (an optimizer's update of a parameter):
            whatever else reads them must have run for the last time before it.
    """

    id: int
    name: str
    reads: tuple[int, ...]
    creates: tuple[int, ...]
    seconds: float
    workspace_bytes: int = 0
    phase: Phase = Phase.FORWARD
    is_random: bool = False
    can_recompute: bool = True
    overwrites: tuple[tuple[int, int], ...] = ()
    layer: str = ""
    mutates: tuple[int, ...] = ()

    @property
    def touches(self) -> tuple[int, ...]:
        """What must be in memory: what it reads, and what it updates without reading it."""
        if not self.mutates:
            return self.reads
        return (*self.reads, *(b for b in self.mutates if b not in self.reads))

    @property
    def short_name(self) -> str:
        """The name without what all ATen names share: "native_layer_norm", "sum.dim_IntList"."""
        return self.name.removeprefix("aten.").removesuffix(".default")


@dataclass(frozen=True)
class StepGraph:
    """A training step: operations in the order of the plain step, and the buffers between them.

    Attributes:
        operations: in an order in which every operation finds its reads computed.
        buffers: by id.
        num_forward: the first `num_forward` operations are the forward.
        forward_outputs: buffers in memory when the forward ends (loss, logits, new batch
            statistics).
        outputs: buffers that outlive the step (loss, gradients of the parameters).
        stored: parameters and states that lie on the far tier of a link when the step starts, and
            must lie there, up to date, and not be in memory when it ends. They cost memory while
            they are in it.
    """

    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    num_forward: int
    forward_outputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        created: set[int] = {b.id for b in self.buffers if b.kind.is_resident}
        mutated: set[int] = set()
        for position, buffer in enumerate(self.buffers):
            if buffer.id != position:
                raise ValueError(f"buffer at position {position} has id {buffer.id}")
        for position, operation in enumerate(self.operations):
            if operation.id != position:
                raise ValueError(f"operation at position {position} has id {operation.id}")
            missing = [b for b in operation.reads if b not in created]
            if missing:
                raise ValueError(
                    f"operation {position} ({operation.name}) reads {missing} too early"
                )
            self._check_overwrites(operation)
            self._check_mutates(operation, mutated)
            created.update(operation.creates)
            mutated.update(operation.mutates)
        lost = [b for b in (*self.forward_outputs, *self.outputs) if b not in created]
        if lost:
            raise ValueError(f"outputs {lost} are created by no operation")
        self._check_stored()

    def _check_stored(self) -> None:
        kinds = (BufferKind.PARAMETER, BufferKind.STATE)
        strange = [
            b for b in self.stored
            if not 0 <= b < len(self.buffers) or self.buffers[b].kind not in kinds
        ]
        if strange:
            raise ValueError(f"stored buffers {strange} are neither parameters nor states")
        kept = sorted({*self.stored} & {*self.forward_outputs, *self.outputs})
        if kept:
            raise ValueError(f"stored buffers {kept} cannot stay in memory as outputs")

    def _check_overwrites(self, operation: Operation) -> None:
        for created, read in operation.overwrites:
            what = f"operation {operation.id} ({operation.name}) cannot put {created} over {read}"
            if created not in operation.creates or read not in operation.reads:
                raise ValueError(f"{what}: it must create the one and read the other")
            sizes = self.buffers[created].bytes, self.buffers[read].bytes
            if sizes[0] != sizes[1]:
                raise ValueError(f"{what}: they have {sizes[0]} and {sizes[1]} bytes")

    def _check_mutates(self, operation: Operation, mutated: set[int]) -> None:
        what = f"operation {operation.id} ({operation.name})"
        late = sorted(mutated.intersection(operation.reads))
        if late:
            raise ValueError(f"{what} reads {late} after their update")
        if operation.mutates and operation.can_recompute:
            raise ValueError(f"{what} updates {operation.mutates} and could run again")
        strange = [b for b in operation.mutates if not self.buffers[b].kind.is_resident]
        if strange:
            raise ValueError(f"{what} updates {strange}, which are not there before the step")

    def parameter_gradients(self) -> frozenset[int]:
        """Return the buffers that updates read, or that the step leaves behind as gradients."""
        read = {b for o in self.operations if o.phase is Phase.UPDATE for b in o.reads}
        return frozenset(
            b for b in (*read, *self.outputs) if self.buffers[b].kind is BufferKind.GRADIENT
        )

    def last_chances(self) -> list[int]:
        """Return for each operation the id of the first one that updates what it reads.

        From there on it cannot run again; `len(operations)` where nothing stands in its way.
        """
        never = len(self.operations)
        updated = {b: o.id for o in reversed(self.operations) for b in o.mutates}
        return [
            min((updated[b] for b in o.reads if b in updated), default=never)
            for o in self.operations
        ]

    @cached_property
    def resident(self) -> frozenset[int]:
        """The buffers that are in memory before, during and after the step: they cost nothing."""
        stored = set(self.stored)
        return frozenset(
            b.id for b in self.buffers if b.kind.is_resident and b.id not in stored
        )

    @property
    def seconds(self) -> float:
        """Duration of the plain step: every operation once."""
        return sum(operation.seconds for operation in self.operations)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a schedule.

    COMPUTE and FREE happen on the compute lane, one after the other. OFFLOAD and FETCH are handed
    to a link that works through them in their order beside it: see `simulate`.

    Attributes:
        action: what to do.
        target: an operation's id for COMPUTE, a buffer's id otherwise.
        overwrite: for COMPUTE, one of the operation's `overwrites` pairs: created buffer first.
    """

    action: Action
    target: int
    overwrite: tuple[int, int] | None = None


@dataclass(frozen=True)
class Schedule:
    """The instructions of one whole step.

    Attributes:
        instructions: in order.
        num_forward: the first `num_forward` instructions run in the forward.
    """

    instructions: tuple[Instruction, ...]
    num_forward: int

    def compute_counts(self) -> dict[int, int]:
        """Return how often each operation runs."""
        counts: dict[int, int] = {}
        for instruction in self.instructions:
            if instruction.action is Action.COMPUTE:
                counts[instruction.target] = counts.get(instruction.target, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer on a link.

    Attributes:
        action: OFFLOAD or FETCH.
        buffer: what is transferred.
        start_seconds, end_seconds: when, from the start of the step.
    """

    action: Action
    buffer: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """What a schedule costs, instruction by instruction.

    Attributes:
        live_bytes: allocated bytes after each instruction, resident buffers not counted.
        peak_bytes: the most allocated at once, workspace included.
        peak_index: the instruction during which that happens.
        seconds: from the start to the end of the last operation and of the last transfer.
        peak_buffers: ids of the buffers in memory at the peak, largest first.
        peak_workspace_bytes: the part of the peak that is workspace.
        link_seconds: how long the link is busy.
        wait_seconds: the part of `seconds` in which operations wait for the link.
        done_seconds: when the compute lane is done with each instruction.
        transfers: what the link does, in order.
    """

    live_bytes: tuple[int, ...]
    peak_bytes: int
    peak_index: int
    seconds: float
    peak_buffers: tuple[int, ...]
    peak_workspace_bytes: int
    link_seconds: float = 0.0
    wait_seconds: float = 0.0
    done_seconds: tuple[float, ...] = ()
    transfers: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A schedule, what it is predicted to cost, and how good it is known to be.

    Attributes:
        schedule: what to run.
        budget_bytes: what it was made for; None for "no limit".
        peak_bytes: predicted peak, resident buffers not counted.
        seconds: predicted duration.
        plain_seconds: predicted duration of the plain step (no recomputation).
        plain_peak_bytes: predicted peak of the plain step.
        bound_seconds: no schedule within the budget is faster than this. Where a step is small
            enough to be searched exactly, the schedules meant are those in which the operations run
            for the first time in the graph's order; elsewhere all.
        status: OPTIMAL where `seconds` meets the bound.
        allowed: names of the approximate techniques that were allowed.
        num_microbatches: how often the schedule runs for one update.
        link_seconds: how long the link is busy.
        wait_seconds: the part of `seconds` in which operations wait for the link.
        offloaded_bytes: what is written to the far tier in one step.
    """

    schedule: Schedule
    budget_bytes: int | None
    peak_bytes: int
    seconds: float
    plain_seconds: float
    plain_peak_bytes: int
    bound_seconds: float
    status: PlanStatus
    allowed: tuple[str, ...] = ()
    num_microbatches: int = 1
    link_seconds: float = 0.0
    wait_seconds: float = 0.0
    offloaded_bytes: int = 0

    def __str__(self) -> str:
        """Return one line: what runs, and at what price."""
        counts = self.schedule.compute_counts()
        num_again = sum(counts.values()) - len(counts)
        limit = "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes)}"
        times = f"{self.num_microbatches} times " if self.num_microbatches > 1 else ""
        plain = format_bytes(self.plain_peak_bytes)
        return (
            f"{times}{len(counts)} operations, {num_again} of them recomputed: "
            f"{format_bytes(self.peak_bytes)}{limit} (plain {plain}), "
            f"{format_seconds(self.seconds)}, {self.slowdown:.3f} x plain; {self.status}"
        )

    @property
    def slowdown(self) -> float:
        """Predicted duration over the plain step's."""
        return self.seconds / self.plain_seconds if self.plain_seconds > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """A path to another memory, on which one transfer follows the other.

    Attributes:
        name: for reports.
        bytes_per_second: from there.
        latency_seconds: before the first byte of each transfer.
        write_bytes_per_second: to there; None for the same as from there.
        compute_share: seconds of computation lost in each second of a transfer, 0 to 1: on a CPU,
            the cores that compute copy, too.
    """

    name: str
    bytes_per_second: float
    latency_seconds: float = 0.0
    write_bytes_per_second: float | None = None
    compute_share: float = 0.0

    def read_seconds(self, num_bytes: int) -> float:
        """Return how long a transfer from the other memory takes."""
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def write_seconds(self, num_bytes: int) -> float:
        """Return how long a transfer to the other memory takes."""
        return self.latency_seconds + num_bytes / (
            self.write_bytes_per_second or self.bytes_per_second
        )


@dataclass(frozen=True, slots=True)
class Device:
    """What a schedule runs on."""

    name: str
    memory_bytes: int
    flops_per_second: float = 0.0
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal devices and the link between them."""

    device: Device
    num_devices: int
    link: Link


@dataclass(frozen=True)
class GraphBuilder:
    """Writes a `StepGraph` down by hand: for tests, documentation and experiments.

    >>> build = GraphBuilder()
    >>> x = build.buffer(8, BufferKind.INPUT, "x")
    >>> y = build.operation("f", [x], [16], seconds=1.0)[0]
    >>> graph = build.finish(num_forward=1, forward_outputs=[y], outputs=[y])
    >>> len(graph.operations), graph.buffers[y].bytes
    (1, 16)
    """

    _buffers: list[Buffer] = field(default_factory=list)
    _operations: list[Operation] = field(default_factory=list)

    def buffer(
        self, num_bytes: int, kind: BufferKind = BufferKind.ACTIVATION, name: str = ""
    ) -> int:
        """Add a buffer and return its id."""
        self._buffers.append(Buffer(len(self._buffers), num_bytes, kind, name))
        return len(self._buffers) - 1

    def operation(
        self,
        name: str,
        reads: Iterable[int],
        creates_bytes: Iterable[int],
        *,
        seconds: float = 0.0,
        workspace_bytes: int = 0,
        phase: Phase = Phase.FORWARD,
        kind: BufferKind | None = None,
        is_random: bool = False,
        can_recompute: bool = True,
        overwrites_read: int | None = None,
        layer: str = "",
        mutates: Iterable[int] = (),
    ) -> list[int]:
        """Add an operation and the buffers that it creates; return those buffers' ids."""
        if kind is None:
            kind = BufferKind.ACTIVATION if phase is Phase.FORWARD else BufferKind.GRADIENT
        created = [self.buffer(size, kind, f"{name}.{i}") for i, size in enumerate(creates_bytes)]
        overwrites = () if overwrites_read is None else ((created[0], overwrites_read),)
        self._operations.append(
            Operation(
                len(self._operations),
                name,
                tuple(reads),
                tuple(created),
                seconds,
                workspace_bytes,
                phase,
                is_random,
                can_recompute,
                overwrites,
                layer,
                tuple(mutates),
            )
        )
        return created

    def finish(
        self,
        num_forward: int,
        forward_outputs: Iterable[int],
        outputs: Iterable[int],
        stored: Iterable[int] = (),
    ) -> StepGraph:
        """Return the graph."""
        return StepGraph(
            tuple(self._operations),
            tuple(self._buffers),
            num_forward,
            tuple(forward_outputs),
            tuple(outputs),
            tuple(stored),
        )
