"""A whole step whose gradients are added up over all ranks before they are consumed.

    gradients of a bucket complete  ->  BUCKET (copied together)  ->  REDUCE (on the network)
                                                                        ...
                                    later on, when the sums are there:  UPDATE, one by one

Where parameters lie in pieces and one update waits for all gradients (to clip their norm), each
rank keeps its own part of a bucket meanwhile, and no more:

    REDUCE  ->  OWN (this rank's part copied)  ->  ...  ->  one UPDATE

A large gradient is reduced where it is, without a copy. How many buckets may be under way before
the updates of the first one wait for it is given: so many gradients are in memory at a time.

Buckets are reduced in the same order on every rank, whatever a planner does: each reduction leaves
a token, a buffer without bytes, that the next one reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from packlight.capture.whole_step import Bucket, WholeStep
from packlight.ranks.pieces import Pieces, segments
from packlight.step import Buffer, BufferKind, Lane, Operation, OperationKind, Phase


@dataclass(frozen=True)
class Reductions:
    """How gradients are added up over all ranks.

    Attributes:
        buckets: primals whose gradients are reduced together, in the order of reduction.
        num_in_flight: how many buckets may be under way when another one is complete; None for all.
        lane: the network.
        copy_seconds: of copying so many bytes together.
        pieces_of: primal -> who has which rows, where each rank gets the sums for its own alone. Of
            the primals of a bucket, all are in pieces or none is.
        rank: this one.
        shared: primals in pieces whose values are whole: ranks share the rows that they update.
        keeps_gradients: they stay whole where they wait for an update.
    """

    buckets: tuple[tuple[int, ...], ...]
    num_in_flight: int | None
    lane: Lane
    copy_seconds: Callable[[int], float]
    pieces_of: Mapping[int, Pieces] = field(default_factory=dict)
    rank: int = 0
    shared: Set[int] = frozenset()
    keeps_gradients: bool = False

    @property
    def packed(self) -> frozenset[int]:
        """The primals whose gradients an update finds in their parameters' layout."""
        together = (p for primals in self.buckets if len(primals) > 1 for p in primals)
        return frozenset(together) | self.pieces_of.keys()


def with_reductions(step: WholeStep, how: Reductions) -> WholeStep:
    """Return a whole step in which every gradient is reduced before its consumer.

    Args:
        step: with consumers of gradients (updates, or one for all).
        how: which buckets; each gradient that is consumed is in one.
    """
    return _Builder(step, how).build()


def gradient_buffer(step: WholeStep, primal: int) -> int:
    """Return the buffer of a parameter's gradient on this rank."""
    return step.joint.buffer_of_node[step.joint.backward_results[primal]]


class _Builder:
    def __init__(self, step: WholeStep, how: Reductions) -> None:
        self.step, self.how, self.graph = step, how, step.joint.graph
        self.buffers = list(self.graph.buffers)
        self.roots = list(step.joint.root_of_buffer)
        self.maker = {b: o.id for o in self.graph.operations for b in o.creates}
        counts = Counter(
            gradient_buffer(step, p) for consumed in step.consumed_by.values() for p in consumed
        )
        self.is_alone = {b for b, count in counts.items() if count == 1}
        self.together = {
            p for consumed in step.consumed_by.values() if len(consumed) > 1 for p in consumed
        }
        # The new order: old operations as they are, new ones with the bucket that they are of, or
        # the primal.
        self.order: list[tuple[Operation, fx.Node, Any, int | None]] = []
        # Of each bucket: the buffer that updates read, and the one with this rank's part alone.
        self.reduced: list[int] = []
        self.own: dict[int, int] = {}
        self.token: int | None = None

    def build(self) -> WholeStep:
        graph, how = self.graph, self.how
        complete: dict[int, list[int]] = {}
        place = 0
        for index, primals in enumerate(how.buckets):  # none before those in front of it
            place = max(place, self._complete_at(primals))
            complete.setdefault(place, []).append(index)
        updates: dict[int | None, list[int]] = {}
        for operation, consumed in self.step.consumed_by.items():
            updates.setdefault(self._bucket_of(consumed), []).append(operation)
        due: list[int] = []  # updates that may run as soon as they stand behind their old place
        in_flight: list[int] = []
        last = len(graph.operations) - 1
        for old in graph.operations:
            if old.id not in self.step.consumed_by:
                self._append_old(old)
            for bucket in complete.get(old.id, ()):
                most = len(how.buckets) if how.num_in_flight is None else how.num_in_flight
                while in_flight and len(in_flight) >= max(most, 1):
                    due += self._landed(in_flight.pop(0), updates)
                due = self._append_updates(due, old.id)
                self._append_reduction(bucket)
                in_flight.append(bucket)
                if most == 0:
                    due += self._landed(in_flight.pop(0), updates)
            if old.id == last:
                due += [u for bucket in in_flight for u in self._landed(bucket, updates)]
                due += updates.get(None, [])
            due = self._append_updates(due, old.id)
        assert not due, "every update has a place"
        return self._renumbered()

    def _landed(
        self, bucket: int, updates: Mapping[int | None, Sequence[int]]
    ) -> Sequence[int]:
        """Have a bucket's sums be waited for; return the updates that did."""
        primals = self.how.buckets[bucket]
        is_cut = primals[0] in self.how.pieces_of and not self.how.keeps_gradients
        if is_cut and primals[0] in self.together:
            self._append_owning(bucket)
        return updates.get(bucket, ())

    def _bucket_of(self, consumed: Sequence[int]) -> int | None:
        """Return the bucket that a consumer waits for; None for one that waits for several."""
        if len(consumed) > 1:
            return None
        return next(i for i, primals in enumerate(self.how.buckets) if consumed[0] in primals)

    def _complete_at(self, primals: Sequence[int]) -> int:
        """Return the operation behind which a bucket can be reduced: in the backward."""
        made = [self.maker.get(gradient_buffer(self.step, p), -1) for p in primals]
        return max([*made, self.graph.num_forward - 1, *self.step.kept_by])

    # -- the new order

    def _append_old(self, old: Operation) -> None:
        joint = self.step.joint
        self.order.append((old, joint.node_of_operation[old.id], joint.facts[old.id], None))

    def _append_updates(self, due: list[int], place: int) -> list[int]:
        """Append the updates that may stand here; return the others."""
        for index in (index for index in due if index <= place):
            old = self.graph.operations[index]
            reads = list(old.reads)
            for primal in self.step.consumed_by[index]:
                bucket = self._bucket_of((primal,)) or 0
                reduced = self.own.get(bucket, self.reduced[bucket])
                own = gradient_buffer(self.step, primal)
                reads = [reduced if b == own else b for b in reads]
                if reduced not in reads:  # two parameters with one gradient, in two buckets
                    reads.append(reduced)
            update = replace(old, reads=tuple(dict.fromkeys(reads)))
            consumed = self.step.consumed_by[index]
            if old.mutates and not self.how.shared.isdisjoint(consumed):
                self._append_shared_update(update, consumed)
            else:
                self._append_old(update)
        return [index for index in due if index > place]

    def _append_reduction(self, index: int) -> None:
        primals = self.how.buckets[index]
        joint, node = self.step.joint, self.step.joint.backward_results[primals[0]]
        layer = f"bucket {index}"
        sources = tuple(dict.fromkeys(gradient_buffer(self.step, p) for p in primals))
        if self._is_reduced_in_place(primals):
            (source,) = sources
        else:
            num_bytes = sum(_num_bytes(joint.backward_results[p]) for p in primals)
            source = self._new_buffer(num_bytes, BufferKind.GRADIENT, layer)
            packing = Operation(
                0, "packlight.bucket", sources, (source,), self.how.copy_seconds(num_bytes),
                phase=Phase.UPDATE, can_recompute=False, layer=layer, kind=OperationKind.BUCKET,
            )
            self.order.append((packing, node, None, index))
        num_bytes = self.buffers[source].bytes
        reduced = self._new_buffer(num_bytes, BufferKind.GRADIENT, layer)
        token = self._new_buffer(0, BufferKind.GRADIENT, f"order of {layer}")
        is_in_pieces = primals[0] in self.how.pieces_of
        speed = self.how.lane.reduce_pieces if is_in_pieces else self.how.lane.reduce
        assert speed is not None, "the lane of a network reduces"
        reduction = Operation(
            0, "packlight.reduce", (source, *(() if self.token is None else (self.token,))),
            (reduced, token), speed.seconds(num_bytes), phase=Phase.UPDATE,
            can_recompute=False, overwrites=((reduced, source),), layer=layer,
            kind=OperationKind.REDUCE, lane=self.how.lane.name,
        )
        self.order.append((reduction, node, None, index))
        self.reduced.append(reduced)
        self.token = token

    def _append_shared_update(self, update: Operation, consumed: Sequence[int]) -> None:
        """Append an update of this rank's rows, and the sharing of all that ranks have updated.

        Where all parameters are updated together, sharing is a part of that.
        """
        if len(consumed) > 1:
            self._append_old(update)
            return
        done = self._new_buffer(0, BufferKind.GRADIENT, f"update of {update.layer}")
        self._append_old(replace(update, creates=(done,)))
        (primal,) = consumed
        num_bytes = _num_bytes(self.step.joint.primals[primal])
        assert self.how.lane.share is not None, "the lane of a network shares"
        token = self._new_buffer(0, BufferKind.GRADIENT, f"order of {update.layer}")
        sharing = Operation(
            0, "packlight.share", (done, *(() if self.token is None else (self.token,))), (token,),
            self.how.lane.share.seconds(num_bytes), phase=Phase.UPDATE, can_recompute=False,
            layer=update.layer, kind=OperationKind.SHARE, lane=self.how.lane.name,
        )
        self.order.append((sharing, self.step.joint.primals[primal], None, primal))
        self.token = token

    def _append_owning(self, index: int) -> None:
        primals = self.how.buckets[index]
        node, layer = self.step.joint.backward_results[primals[0]], f"bucket {index}"
        pieces = [self.how.pieces_of[primal] for primal in primals]
        ends = segments(pieces)
        most = max(end - start for start, end in zip((0, *ends), ends, strict=False))
        num_bytes = most * node.meta["val"].itemsize
        own = self.own[index] = self._new_buffer(num_bytes, BufferKind.GRADIENT, layer)
        owning = Operation(
            0, "packlight.own", (self.reduced[index],), (own,), self.how.copy_seconds(num_bytes),
            phase=Phase.UPDATE, can_recompute=False, layer=layer, kind=OperationKind.OWN,
        )
        self.order.append((owning, node, None, index))

    def _is_reduced_in_place(self, primals: Sequence[int]) -> bool:
        if len(primals) > 1:
            return False
        buffer = self.graph.buffers[gradient_buffer(self.step, primals[0])]
        node = self.step.joint.backward_results[primals[0]]
        fills = buffer.bytes == _num_bytes(node)
        if primals[0] in self.how.pieces_of and not node.meta["val"].is_contiguous():
            return False  # a piece's rows have to lie together
        is_own = buffer.id in self.is_alone and buffer.id in self.maker
        return fills and is_own and buffer.id not in self.graph.outputs

    def _new_buffer(self, num_bytes: int, kind: BufferKind, name: str) -> int:
        self.buffers.append(Buffer(len(self.buffers), num_bytes, kind, name))
        self.roots.append(None)
        return len(self.buffers) - 1

    def _renumbered(self) -> WholeStep:
        step, joint = self.step, self.step.joint
        new_id: dict[int, int] = {}
        packing: dict[int, int] = {}
        reduction: dict[int, int] = {}
        owning: dict[int, int] = {}
        shared_by: dict[int, int] = {}
        operations = []
        for place, (operation, _, _, bucket) in enumerate(self.order):
            if bucket is None:
                new_id[operation.id] = place
            elif operation.kind is OperationKind.BUCKET:
                packing[bucket] = place
            elif operation.kind is OperationKind.OWN:
                owning[bucket] = place
            elif operation.kind is OperationKind.SHARE:
                shared_by[place] = bucket
            else:
                reduction[bucket] = place
            operations.append(replace(operation, id=place))
        graph = replace(self.graph, operations=tuple(operations), buffers=tuple(self.buffers))
        joint = replace(
            joint,
            graph=graph,
            node_of_operation=[node for _, node, _, _ in self.order],
            root_of_buffer=self.roots,
            overwritten_argument={
                (new_id[o], b): a for (o, b), a in joint.overwritten_argument.items()
            },
            rng_state_of={new_id[o]: b for o, b in joint.rng_state_of.items()},
            facts=[facts for _, _, facts, _ in self.order],
        )
        return replace(
            step,
            joint=joint,
            consumed_by={new_id[o]: primals for o, primals in step.consumed_by.items()},
            kept_by={new_id[o]: results for o, results in step.kept_by.items()},
            buckets=tuple(
                Bucket(
                    primals, packing.get(i), reduction[i], self.reduced[i], owning.get(i),
                    self.own.get(i),
                )
                for i, primals in enumerate(self.how.buckets)
            ),
            pieces_of=self.how.pieces_of,
            rank=self.how.rank,
            shared_by=shared_by,
        )


def _num_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.itemsize)
