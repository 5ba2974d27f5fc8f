"""A captured forward and backward completed to a whole step: results kept, gradients consumed.

What `read_joint_graph` returns ends with the gradients of all parameters in memory. Here each
gradient gets an operation that consumes it, so that a schedule may end its life long before the
step's end:

- update: the optimizer updates the parameter at once. It stands after the last operation that reads
  the parameter, since those must see the old value.
- accumulate: the gradient is added to the one of earlier microbatches.
- together: one operation at the end takes all gradients (clipping by a global norm, optimizers that
  look at all parameters at once).

Results (the loss, new batch statistics) move to a storage of their own as soon as they are made
(by taking over the old one), so that the operation behind them can run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from torch import fx

from packlight.capture.joint import JointStep
from packlight.ranks.pieces import Pieces
from packlight.step import Buffer, BufferKind, Operation, OperationKind, Phase


class Consumption(StrEnum):
    """What happens to gradients; see the head of this file."""

    UPDATE = "update"
    ACCUMULATE = "accumulate"
    TOGETHER = "together"


@dataclass(frozen=True, slots=True)
class Consumer:
    """What consuming the gradient of one parameter costs.

    Attributes:
        name: of the parameter.
        seconds: of the update or the addition.
        workspace_bytes: the most that it allocates for a moment.
        state_bytes: optimizer state that the update reads and writes.
    """

    name: str
    seconds: float = 0.0
    workspace_bytes: int = 0
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are added up over all ranks together (see reduced.py).

    Attributes:
        primals: whose gradients, in their order in the bucket.
        packing: the operation that copies them into one buffer; None for a single gradient that is
            reduced where it is.
        reduction: the operation that adds up.
        reduced: the buffer with the sums.
        owning: the operation that copies this rank's part of them, where that waits for an update.
        own: the buffer with that part.
    """

    primals: tuple[int, ...]
    packing: int | None
    reduction: int
    reduced: int
    owning: int | None = None
    own: int | None = None


@dataclass(frozen=True)
class WholeStep:
    """A training step in which every gradient is consumed.

    Attributes:
        joint: the captured step; its graph has the added operations.
        consumed_by: operation -> primals whose gradients it consumes.
        grouped: those operations that update several parameters with one call, in the backward.
        kept_by: operation -> indices of the forward results, all the same, that it keeps.
        state_buffer_of: primal -> the buffer that stands for its optimizer state.
        parameter_buffer_of: primal -> its buffer, for those that are streamed themselves.
        buckets: gradients that all ranks add up together, in the order in which they do.
        pieces_of: primal -> who has which rows, for parameters that lie in pieces with all ranks.
        rank: which of them this one is.
        shared_by: operation -> the primal whose rows all ranks share then.
    """

    joint: JointStep
    consumed_by: Mapping[int, tuple[int, ...]]
    kept_by: Mapping[int, tuple[int, ...]]
    state_buffer_of: Mapping[int, int]
    parameter_buffer_of: Mapping[int, int] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    pieces_of: Mapping[int, Pieces] = field(default_factory=dict)
    rank: int = 0
    shared_by: Mapping[int, int] = field(default_factory=dict)
    grouped: frozenset[int] = frozenset()

    @cached_property
    def bucket_of(self) -> dict[int, int]:
        """Primal -> the bucket in which its gradient is reduced."""
        return {primal: i for i, b in enumerate(self.buckets) for primal in b.primals}


def whole_step(
    joint: JointStep,
    consumers: Mapping[int, Consumer],
    how: Consumption,
    together: Consumer | None = None,
    groups: Mapping[tuple[int, ...], Consumer] | None = None,
) -> WholeStep:
    """Return a step whose gradients are consumed.

    Args:
        joint: captured with no mutated primals: the caller writes new values back at the end.
        consumers: primal -> what consuming its gradient costs; gradients of other primals are
            dropped.
        how: what happens to gradients.
        together: for `Consumption.TOGETHER`, what the one update costs.
        groups: for `Consumption.UPDATE`, primals that are updated by one call -> what that costs.
    """
    return _Builder(joint, consumers, how, together, groups or {}).build()


def updatable_after(joint: JointStep) -> dict[int, int]:
    """Return primal -> the last operation that makes or reads its gradient, or reads its value."""
    graph = joint.graph
    last: dict[int, int] = {}
    for operation in graph.operations:
        last.update(dict.fromkeys((*operation.reads, *operation.creates), operation.id))
    end = len(graph.operations) - 1
    found = {}
    for primal, node in enumerate(joint.backward_results):
        if isinstance(node, fx.Node):
            value = joint.buffer_of_node[joint.primals[primal]]
            found[primal] = max(last.get(joint.buffer_of_node[node], end), last.get(value, -1))
    return found


class _Builder:
    def __init__(
        self,
        joint: JointStep,
        consumers: Mapping[int, Consumer],
        how: Consumption,
        together: Consumer | None,
        groups: Mapping[tuple[int, ...], Consumer],
    ) -> None:
        self.joint, self.consumers, self.how, self.together = joint, consumers, how, together
        self.groups = groups
        self.old = joint.graph
        tangents = {
            b for o in self.old.operations
            if o.kind is OperationKind.TANGENT for b in o.creates
        }
        self.buffers = [
            replace(b, kind=BufferKind.INPUT) if b.id in tangents else b for b in self.old.buffers
        ]
        self.roots = list(joint.root_of_buffer)
        self.maker = {b: o.id for o in self.old.operations for b in o.creates}
        self.kept_by: dict[int, tuple[int, ...]] = {}
        self.consumed_by: dict[int, tuple[int, ...]] = {}
        self.state_buffer_of: dict[int, int] = {}
        # Operations to add after an old one, each with its node and what it keeps or consumes.
        self.added: dict[int, list[tuple[Operation, fx.Node, Any]]] = {}

    def build(self) -> WholeStep:
        outputs = self._keep_results()
        self._consume_gradients(outputs)
        operations: list[Operation] = []
        nodes: list[fx.Node] = []
        facts: list[Any] = []
        new_id: dict[int, int] = {}
        num_forward = 0
        for old in (None, *self.old.operations):
            if old is not None and old.kind is not OperationKind.TANGENT:
                new_id[old.id] = len(operations)
                operations.append(replace(old, id=len(operations)))
                nodes.append(self.joint.node_of_operation[old.id])
                facts.append(self.joint.facts[old.id])
            for operation, node, origin in self.added.get(-1 if old is None else old.id, ()):
                index = len(operations)
                operations.append(replace(operation, id=index))
                nodes.append(node)
                facts.append(None)
                is_kept = operation.kind is OperationKind.KEEP
                (self.kept_by if is_kept else self.consumed_by)[index] = origin
            if old is None or old.id < self.old.num_forward:
                num_forward = len(operations)
        graph = replace(
            self.old,
            operations=tuple(operations),
            buffers=tuple(self.buffers),
            num_forward=num_forward,
            forward_outputs=(),
            outputs=tuple(outputs),
        )
        joint = replace(
            self.joint,
            graph=graph,
            node_of_operation=nodes,
            root_of_buffer=self.roots,
            overwritten_argument={
                (new_id[o], b): a for (o, b), a in self.joint.overwritten_argument.items()
            },
            rng_state_of={new_id[o]: b for o, b in self.joint.rng_state_of.items()},
            facts=facts,
        )
        grouped = [o for o, primals in self.consumed_by.items() if primals in self.groups]
        return WholeStep(
            joint, self.consumed_by, self.kept_by, self.state_buffer_of,
            grouped=frozenset(grouped),
        )

    def _new_buffer(self, num_bytes: int, kind: BufferKind, name: str) -> int:
        self.buffers.append(Buffer(len(self.buffers), num_bytes, kind, name))
        self.roots.append(None)
        return len(self.buffers) - 1

    def _add(self, after: int, operation: Operation, node: fx.Node, origin: Any) -> None:
        self.added.setdefault(after, []).append((operation, node, origin))

    def _keep_results(self) -> list[int]:
        """Give every result a storage of its own from where it is made; return those buffers."""
        of_node: dict[fx.Node, list[int]] = {}
        for index, node in enumerate(self.joint.forward_results):
            if isinstance(node, fx.Node) and node in self.joint.buffer_of_node:
                of_node.setdefault(node, []).append(index)
        num_sharing = Counter(self.joint.buffer_of_node[node] for node in of_node)
        outputs = []
        for node, results in of_node.items():
            buffer = self.joint.buffer_of_node[node]
            if self.buffers[buffer].kind.is_resident:
                continue
            old = self.buffers[buffer]
            self.buffers[buffer] = replace(old, kind=BufferKind.ACTIVATION)
            kept = self._new_buffer(old.bytes, BufferKind.OUTPUT, old.name)
            # Of several results that look at one storage, none can take it over.
            is_alone = num_sharing[buffer] == 1
            operation = Operation(
                0, "packlight.keep", (buffer,), (kept,), 0.0, kind=OperationKind.KEEP,
                phase=self.old.operations[self.maker[buffer]].phase,
                can_recompute=False, overwrites=((kept, buffer),) if is_alone else (),
                layer=self.old.operations[self.maker[buffer]].layer,
            )
            self._add(self.maker[buffer], operation, node, tuple(results))
            outputs.append(kept)
        return outputs

    def _consume_gradients(self, results: list[int]) -> None:
        last_read: dict[int, int] = {}
        for operation in self.old.operations:
            for buffer in operation.reads:
                last_read[buffer] = operation.id
        end = len(self.old.operations) - 1
        # Nothing is updated before the loss is known to be finite.
        result_made = max((after for after in self.added), default=-1)
        all_reads: dict[int, None] = {}
        all_mutated: list[int] = []
        first_node: fx.Node | None = None
        all_primals: list[int] = []
        group_of = {primal: primals for primals in self.groups for primal in primals}
        grouped: dict[tuple[int, ...], dict[int, tuple[int, Operation, fx.Node]]] = {}
        for primal, consumer in self.consumers.items():
            node = self.joint.backward_results[primal]
            if not isinstance(node, fx.Node):
                continue
            gradient = self.joint.buffer_of_node[node]
            parameter = self.joint.buffer_of_node[self.joint.primals[primal]]
            reads: tuple[int, ...] = (gradient, *results)
            mutates: tuple[int, ...] = ()
            if self.how is not Consumption.ACCUMULATE:
                mutates = (parameter,)
                if consumer.state_bytes:
                    name = f"optimizer state of {consumer.name}"
                    state = self._new_buffer(consumer.state_bytes, BufferKind.STATE, name)
                    self.state_buffer_of[primal] = state
                    mutates = (parameter, state)
                reads = (*reads, *mutates)
            if self.how is Consumption.TOGETHER:
                all_reads.update(dict.fromkeys(reads))
                all_mutated.extend(mutates)
                first_node = first_node or node
                all_primals.append(primal)
                continue
            made = self.maker.get(gradient, end)
            # Whoever consumes a gradient may overwrite it: nobody reads it afterwards.
            after = max(made, result_made, last_read.get(gradient, -1))
            if mutates:
                after = max(after, last_read.get(parameter, -1))
            operation = Operation(
                0, "packlight.update", reads, (), consumer.seconds, consumer.workspace_bytes,
                Phase.UPDATE, can_recompute=False, layer=consumer.name, mutates=mutates,
                kind=OperationKind.UPDATE,
            )
            if primal in group_of:
                grouped.setdefault(group_of[primal], {})[primal] = after, operation, node
            else:
                self._add(after, operation, node, (primal,))
        for primals, members in grouped.items():
            self._add_group(primals, [members[primal] for primal in primals])
        if first_node is not None:
            assert self.together is not None
            operation = Operation(
                0, "packlight.update", tuple(all_reads), (), self.together.seconds,
                self.together.workspace_bytes, Phase.UPDATE, can_recompute=False,
                layer=self.together.name, mutates=tuple(all_mutated), kind=OperationKind.UPDATE,
            )
            self._add(end, operation, first_node, tuple(all_primals))

    def _add_group(
        self, primals: tuple[int, ...], members: Sequence[tuple[int, Operation, fx.Node]]
    ) -> None:
        """Add one operation in the place of several updates, when the last of them can be made."""
        cost = self.groups[primals]
        operations = [operation for _, operation, _ in members]
        operation = replace(
            operations[0],
            reads=tuple(dict.fromkeys(b for o in operations for b in o.reads)),
            mutates=tuple(b for o in operations for b in o.mutates),
            seconds=cost.seconds, workspace_bytes=cost.workspace_bytes, layer=cost.name,
        )
        self._add(max(after for after, _, _ in members), operation, members[0][2], primals)
