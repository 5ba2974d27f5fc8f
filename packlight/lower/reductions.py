"""Gradients added up over all ranks, in generated code: copied together, sent, waited for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from packlight.capture.whole_step import Bucket
from packlight.lower.facts import Facts
from packlight.lower.values import Values, plain_meta
from packlight.ranks.pieces import Pieces, segments
from packlight.step import Instruction

# Where a gradient lies in its bucket: its shape and strides (in elements).
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def pack(gradients: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> torch.Tensor:
    """Return gradients in one buffer, one after the other, each in its layout.

    >>> pack([torch.ones(2), torch.zeros(1, 2)], [((2,), (1,)), ((1, 2), (2, 1))])
    tensor([1., 1., 0., 0.])
    """
    first = gradients[0]
    flat = first.new_empty(sum(gradient.numel() for gradient in gradients))
    for gradient, slot in zip(gradients, slots(flat, layouts), strict=True):
        slot.copy_(gradient)
    return flat


def slots(flat: torch.Tensor, layouts: Sequence[Layout]) -> list[torch.Tensor]:
    """Return the gradients in a bucket, as views."""
    views, offset = [], 0
    for shape, stride in layouts:
        views.append(flat.as_strided(shape, stride, offset))
        offset += views[-1].numel()
    return views


def slot(flat: torch.Tensor, layouts: Sequence[Layout], place: int) -> torch.Tensor:
    """Return one gradient in a bucket, as a view."""
    return slots(flat, layouts)[place]


def layout_like(parameter: torch.Tensor) -> Layout:
    """Return how a parameter's gradient lies in a bucket: as eager's does in memory."""
    like = torch.empty_like(parameter, device="meta")
    return tuple(map(int, like.shape)), tuple(map(int, like.stride()))


def pack_pieces(
    gradients: Sequence[torch.Tensor], rows: Sequence[Sequence[tuple[int, int]]]
) -> torch.Tensor:
    """Return gradients in one buffer, each rank's rows of all of them together.

    Args:
        gradients: in any layout.
        rows: of each gradient, the first and the one behind the last of every rank.

    >>> pack_pieces([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [[(0, 1), (1, 2)]] * 2)
    tensor([1., 3., 2., 4.])
    """
    flat = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
    start = 0
    for rank in range(len(rows[0])):
        for gradient, cuts in zip(gradients, rows, strict=True):
            first, end = cuts[rank]
            own = gradient[first:end]
            flat[start : start + own.numel()].view(own.shape).copy_(own)
            start += own.numel()
    return flat


def piece(flat: torch.Tensor, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a rank's rows of one gradient in a buffer in which they lie, as a view."""
    num_elements = prod(shape)
    return flat.as_strided((num_elements,), (1,), offset).view(shape)


class ReductionWriter:
    """Writes reductions and the waits for them."""

    def __init__(self, facts: Facts) -> None:
        self.step, self.joint = facts.step, facts.step.joint
        self._waited: set[int] = set()
        self._of_operation = {
            operation: index
            for index, bucket in enumerate(self.step.buckets)
            for operation in (bucket.packing, bucket.reduction, bucket.owning)
            if operation is not None
        }

    def begin(self, values: Values, helpers: dict[str, fx.Node]) -> None:
        """Go on in another section."""
        self._values, self._helpers, self._graph = values, helpers, values.graph

    def pack(self, instruction: Instruction) -> None:
        """Copy the gradients of a bucket into one buffer."""
        bucket = self.step.buckets[self._of_operation[instruction.target]]
        nodes = [self.joint.backward_results[primal] for primal in bucket.primals]
        gradients = [self._values.of(node) for node in nodes]
        if pieces := self._pieces(bucket):
            rows = tuple(one.rows for one in pieces)
            flat = self._graph.call_function(pack_pieces, (gradients, rows))
        else:
            flat = self._graph.call_function(pack, (gradients, self._layouts(bucket)))
        (buffer,) = self.joint.graph.operations[instruction.target].creates
        self._values.place_alone(buffer, flat)

    def reduce(self, instruction: Instruction) -> None:
        """Start adding up what all ranks have in a bucket."""
        index = self._of_operation[instruction.target]
        bucket = self.step.buckets[index]
        operation = self.joint.graph.operations[instruction.target]
        source, reduced = operation.reads[0], bucket.reduced
        if bucket.packing is None:
            node = self.joint.backward_results[bucket.primals[0]]
            value = self._values.of(node)
        else:
            value = self._values.whole(source)
        if instruction.overwrite is None:  # somebody still wants it as it is
            copy = self._graph.call_function(torch.ops.aten.clone.default, (value,))
            if bucket.packing is None:
                copy.meta = plain_meta(node.meta)
            value = copy
        else:
            self._values.forget(source)
        pieces = self._pieces(bucket)
        ends = (segments(pieces),) if pieces else ()
        self._graph.call_method("start", (self._helpers["reducer"], index, value, *ends))
        self._values.place_alone(reduced, value)

    def own(self, instruction: Instruction) -> None:
        """Copy this rank's part of a bucket, when the sums are there."""
        bucket = self.step.buckets[self._of_operation[instruction.target]]
        pieces = self._pieces(bucket)
        first, end = (0, *segments(pieces))[self.step.rank : self.step.rank + 2]
        reduced = self._reduced(bucket)
        part = self._graph.call_function(piece, (reduced, first, (end - first,)))
        own = self._graph.call_function(torch.ops.aten.clone.default, (part,))
        assert bucket.own is not None
        self._values.place_alone(bucket.own, own)

    def gradient(self, primal: int) -> fx.Node:
        """Return a parameter's gradient, added up over all ranks: of one in pieces, this rank's."""
        bucket = self.step.buckets[self.step.bucket_of[primal]]
        is_own = bucket.own is not None
        value = self._reduced(bucket) if bucket.own is None else self._values.whole(bucket.own)
        if pieces := self._pieces(bucket):
            rank, place = self.step.rank, bucket.primals.index(primal)
            before = 0 if is_own else (0, *segments(pieces))[rank]
            offset = before + sum(p.num_elements(rank) for p in pieces[:place])
            shape = (pieces[place].num_rows(rank), *pieces[place].shape[1:])
            return self._graph.call_function(piece, (value, offset, shape))
        if bucket.packing is None:
            return value
        place = bucket.primals.index(primal)
        return self._graph.call_function(slot, (value, self._layouts(bucket), place))

    def _reduced(self, bucket: Bucket) -> fx.Node:
        """Return a bucket with the sums of all ranks, for which the first to ask waits."""
        index = self.step.bucket_of[bucket.primals[0]]
        if index not in self._waited:
            self._waited.add(index)
            self._graph.call_method("wait", (self._helpers["reducer"], index))
        return self._values.whole(bucket.reduced)

    def _pieces(self, bucket: Bucket) -> tuple[Pieces, ...]:
        """Return how a bucket's parameters lie in pieces; none where they do not."""
        pieces_of = self.step.pieces_of
        return tuple(pieces_of[p] for p in bucket.primals if p in pieces_of)

    def _layouts(self, bucket: Bucket) -> tuple[Layout, ...]:
        return tuple(
            layout_like(self.joint.primals[primal].meta["val"]) for primal in bucket.primals
        )
