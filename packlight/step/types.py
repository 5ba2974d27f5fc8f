"""One training step as data: what is computed and moved, and what that leaves in memory.

A `StepGraph` says what must be computed and what may be moved between memories. A `Schedule` says
when, how often, and when each buffer is freed (`schedule.py`). All are frozen and free of torch, so
planners and tests can run where torch is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packlight.step.machine import Machine
    from packlight.step.schedule import Schedule


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
        """Whether it is there before the step: in memory, or in another one that it rests in."""
        return self in (BufferKind.PARAMETER, BufferKind.INPUT, BufferKind.STATE)


class OperationKind(StrEnum):
    """What an operation is, which decides how it is written down and what it may do.

    COMPUTE is a call. KEEP moves a result to a storage of its own. UPDATE consumes a gradient: an
    optimizer's update, or the addition to a sum. GENERATOR takes the state of a generator before a
    random operation, TANGENT stands for the arrival of what the backward starts from, SNAPSHOT for
    the copy of an input that the caller overwrites after the forward. READ brings a buffer from
    another memory, WRITE copies one there. BUCKET copies gradients into one buffer, REDUCE adds up
    what all ranks have in it, where it is, on a network's lane; OWN copies what of such sums is
    this rank's, SHARE gives all ranks the rows that each has updated. HAND_ON ends the half of a
    backward that a pipeline's earlier stage waits for. These five run once.
    """

    COMPUTE = "compute"
    KEEP = "keep"
    UPDATE = "update"
    GENERATOR = "generator"
    TANGENT = "tangent"
    SNAPSHOT = "snapshot"
    READ = "read"
    WRITE = "write"
    BUCKET = "bucket"
    REDUCE = "reduce"
    OWN = "own"
    SHARE = "share"
    HAND_ON = "hand on"

    @property
    def is_transfer(self) -> bool:
        """Whether it moves a buffer between memories, on a lane beside computation."""
        return self in (OperationKind.READ, OperationKind.WRITE)


class Phase(StrEnum):
    """The part of the step that a computation belongs to; transfers belong to none."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Buffer:
    """One storage in one memory. Views are folded into the buffer that they look at.

    Attributes:
        id: position in `StepGraph.buffers`.
        bytes: size of the whole storage.
        kind: what it holds; resident kinds are there before the step and cost nothing, unless an
            operation brings them (see `StepGraph.resident`).
        name: the name that reports show.
        memory: where it is; "" for the device's own memory. A copy elsewhere is another buffer.
    """

    id: int
    bytes: int
    kind: BufferKind
    name: str = ""
    memory: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that reads buffers and creates buffers, or one transfer.

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
            whatever else reads them must have run for the last time before it. Of a write: the
            buffer in the other memory that it brings up to date.
        kind: what it is.
        lane: what runs it beside computation, one after the other; "" for computation itself.
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
    kind: OperationKind = OperationKind.COMPUTE
    lane: str = ""

    @property
    def touches(self) -> tuple[int, ...]:
        """What must be in memory: what it reads, and what it updates without reading it."""
        if not self.mutates:
            return self.reads
        return (*self.reads, *(b for b in self.mutates if b not in self.reads))

    @property
    def moved(self) -> int:
        """Of a transfer: the buffer that it moves, as it is in the device's memory."""
        assert self.kind.is_transfer, f"{self.name} moves nothing"
        return (self.creates if self.kind is OperationKind.READ else self.reads)[0]

    @property
    def short_name(self) -> str:
        """The name without what all ATen names share: "native_layer_norm", "sum.dim_IntList"."""
        return self.name.removeprefix("aten.").removesuffix(".default")


@dataclass(frozen=True)
class StepGraph:
    """A training step: operations in the order of the plain step, and the buffers between them.

    Transfers stand behind all computations and may run anywhere, any number of times or never. A
    read makes a buffer in the device's memory from its copy in another one, a write makes the copy.
    A parameter or state that a read makes rests in the other memory: it lies there when the step
    starts, and must lie there, up to date, and not be in the device's memory when it ends. What
    lies in pieces with all ranks is updated there.

    Attributes:
        operations: in an order in which every operation finds its reads computed.
        buffers: by id.
        num_forward: the first `num_forward` operations are the forward.
        forward_outputs: buffers in memory when the forward ends (loss, logits, new batch
            statistics).
        outputs: buffers that outlive the step (loss, gradients of the parameters).
    """

    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    num_forward: int
    forward_outputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        for position, buffer in enumerate(self.buffers):
            if buffer.id != position:
                raise ValueError(f"buffer at position {position} has id {buffer.id}")
        created: set[int] = {
            b.id for b in self.buffers if b.kind.is_resident and not b.memory
        }
        mutated: set[int] = set()
        num_transfers = 0
        for position, operation in enumerate(self.operations):
            if operation.id != position:
                raise ValueError(f"operation at position {position} has id {operation.id}")
            if operation.kind.is_transfer:
                num_transfers += 1
                self._check_transfer(operation)
                continue
            if num_transfers:
                raise ValueError(f"{_named(operation)} does not stand before all transfers")
            self._check_lane(operation)
            missing = [b for b in operation.reads if b not in created]
            if missing:
                raise ValueError(f"{_named(operation)} reads {missing} too early")
            self._check_overwrites(operation)
            self._check_mutates(operation, mutated)
            created.update(operation.creates)
            mutated.update(operation.mutates)
        lost = [b for b in (*self.forward_outputs, *self.outputs) if b not in created]
        if lost:
            raise ValueError(f"outputs {lost} are created by no operation")
        kept = sorted({*self.resting} & {*self.forward_outputs, *self.outputs})
        if kept:
            raise ValueError(f"buffers {kept} rest elsewhere and cannot stay in memory as outputs")

    def _check_lane(self, operation: Operation) -> None:
        is_collective = operation.kind in (OperationKind.REDUCE, OperationKind.SHARE)
        if bool(operation.lane) is not is_collective:
            raise ValueError(f"{_named(operation)}: reductions have a lane, computations none")
        if is_collective and operation.can_recompute:
            raise ValueError(f"{_named(operation)} could run again")

    def _check_transfer(self, operation: Operation) -> None:
        what, made = _named(operation), (*operation.creates, *operation.mutates)
        ids = (*operation.reads, *made)
        if len(operation.reads) != 1 or len(made) != 1 or not operation.lane:
            raise ValueError(f"{what} does not move one buffer on a lane")
        if not all(0 <= b < len(self.buffers) for b in ids):
            raise ValueError(f"{what} moves {ids} of {len(self.buffers)} buffers")
        source, target = (self.buffers[b] for b in ids)
        near, far = (target, source) if operation.kind is OperationKind.READ else (source, target)
        if near.memory or not far.memory or near.bytes != far.bytes:
            raise ValueError(f"{what} does not move a buffer between the device and elsewhere")
        is_fixed = bool(operation.mutates) and not far.kind.is_resident
        if is_fixed or (operation.mutates and operation.kind is OperationKind.READ):
            raise ValueError(f"{what} updates {made}, which does not rest in another memory")

    def _check_overwrites(self, operation: Operation) -> None:
        for created, read in operation.overwrites:
            what = f"{_named(operation)} cannot put {created} over {read}"
            if created not in operation.creates or read not in operation.reads:
                raise ValueError(f"{what}: it must create the one and read the other")
            sizes = self.buffers[created].bytes, self.buffers[read].bytes
            if sizes[0] != sizes[1]:
                raise ValueError(f"{what}: they have {sizes[0]} and {sizes[1]} bytes")

    def _check_mutates(self, operation: Operation, mutated: set[int]) -> None:
        what = _named(operation)
        late = sorted(mutated.intersection(operation.reads))
        if late:
            raise ValueError(f"{what} reads {late} after their update")
        if operation.mutates and operation.can_recompute:
            raise ValueError(f"{what} updates {operation.mutates} and could run again")
        strange = [b for b in operation.mutates if not self.buffers[b].kind.is_resident]
        if strange:
            raise ValueError(f"{what} updates {strange}, which are not there before the step")

    # -- how a buffer comes to be where it is

    def makers(self, buffer: int) -> tuple[Operation, ...]:
        """Return the operations that make a buffer, its computation before reads.

        Each of those that may run again can bring it back once it was let go of: computed again,
        or read from another memory.
        """
        return self._makers.get(buffer, ())

    @cached_property
    def _makers(self) -> dict[int, tuple[Operation, ...]]:
        found: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for buffer in operation.creates:
                found.setdefault(buffer, []).append(operation)
        return {buffer: tuple(operations) for buffer, operations in found.items()}

    @cached_property
    def num_computations(self) -> int:
        """How many of the operations are computations: the first ones."""
        reversed_ids = (o.id for o in reversed(self.operations) if not o.kind.is_transfer)
        return next(reversed_ids, -1) + 1

    @cached_property
    def computations(self) -> tuple[Operation, ...]:
        """The operations that are no transfers."""
        return self.operations[: self.num_computations]

    @cached_property
    def transfers(self) -> tuple[Operation, ...]:
        """The reads and writes."""
        return self.operations[self.num_computations :]

    @cached_property
    def resting(self) -> dict[int, int]:
        """The buffers that rest in another memory, each with the one that is them there."""
        return {
            o.creates[0]: o.reads[0]
            for o in self.transfers
            if o.kind is OperationKind.READ and self.buffers[o.reads[0]].kind.is_resident
        }

    @cached_property
    def resident(self) -> frozenset[int]:
        """What is where it is before, during and after the step: it costs nothing.

        What operations update where it rests (parameters in pieces) is among it.
        """
        return frozenset(
            b.id for b in self.buffers
            if b.kind.is_resident and not b.memory and b.id not in self.resting
        ) | self.gathered_from.keys()

    @cached_property
    def gathered_from(self) -> dict[int, int]:
        """What is updated where it rests in another memory -> the buffer that it is here."""
        updated = {b for o in self.computations for b in o.mutates}
        return {there: here for here, there in self.resting.items() if there in updated}

    def without_transfers(self) -> StepGraph:
        """Return the computations alone, ids unchanged; what rests elsewhere is then resident."""
        if not self.transfers:
            return self
        num = next((b.id for b in self.buffers if b.memory), len(self.buffers))
        computations = tuple(_renamed(o, self.gathered_from) for o in self.computations)
        return replace(self, operations=computations, buffers=self.buffers[:num])

    @cached_property
    def reductions(self) -> tuple[Operation, ...]:
        """The operations that work on a network beside the others."""
        return tuple(o for o in self.computations if o.lane)

    def with_reductions_in_line(self, machine: Machine | None = None) -> StepGraph:
        """Return the step in which reductions only take what they take from computation.

        Ids stay what they are, and so does what schedules hold: bytes count from where a reduction
        is issued. Only when computation waits for it is not told.

        Args:
            machine: with their lanes; without it they take nothing.
        """
        if not self.reductions:
            return self
        share = {lane.name: lane.compute_share for lane in machine.lanes} if machine else {}
        return self.with_computations(
            replace(
                o, lane="", kind=OperationKind.COMPUTE, seconds=share.get(o.lane, 0.0) * o.seconds
            ) if o.lane else o
            for o in self.computations
        )

    def with_computations(self, computations: Iterable[Operation]) -> StepGraph:
        """Return the step with other computations, perhaps those of `without_transfers`."""
        there = {here: there for there, here in self.gathered_from.items()}
        renamed = (_renamed(operation, there) for operation in computations)
        return replace(self, operations=(*renamed, *self.transfers))

    # -- what else planners and reports ask

    def parameter_gradients(self) -> frozenset[int]:
        """Return the buffers that updates read, or that the step leaves behind as gradients."""
        read = {b for o in self.computations if o.phase is Phase.UPDATE for b in o.reads}
        return frozenset(
            b for b in (*read, *self.outputs) if self.buffers[b].kind is BufferKind.GRADIENT
        )

    def last_chances(self) -> list[int]:
        """Return for each computation the id of the first one that updates what it reads.

        From there on it cannot run again; their number where nothing stands in its way.
        """
        never = self.num_computations
        updated = {b: o.id for o in reversed(self.computations) for b in o.mutates}
        updated.update({here: updated[there] for there, here in self.gathered_from.items()})
        return [
            min((updated[b] for b in o.reads if b in updated), default=never)
            for o in self.computations
        ]

    def reruns(self, schedule: Schedule) -> dict[int, int]:
        """Return for each computation that a schedule runs again how many times more it does."""
        counts = Counter(run for run in schedule.runs() if run < self.num_computations)
        return {index: count - 1 for index, count in counts.items() if count > 1}

    def written(self, schedule: Schedule) -> list[int]:
        """Return the buffers that a schedule writes to other memories, in order."""
        runs = (self.operations[run] for run in schedule.runs())
        return [o.moved for o in runs if o.kind is OperationKind.WRITE]

    @property
    def seconds(self) -> float:
        """Duration of the plain step's computations: each once, beside reductions."""
        return sum(operation.seconds for operation in self.computations if not operation.lane)


def _renamed(operation: Operation, new: Mapping[int, int]) -> Operation:
    """Return an operation that updates other buffers."""
    mutates = tuple(new.get(b, b) for b in operation.mutates)
    return operation if mutates == operation.mutates else replace(operation, mutates=mutates)


def _named(operation: Operation) -> str:
    return f"operation {operation.id} ({operation.name})"
