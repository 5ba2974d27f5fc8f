"""Writes a region's calls into a graph chunk by chunk, and puts together what the rest reads."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.marks import LATE_KEY
from packlight.capture.writer import GraphWriter
from packlight.moves.chunk.regions import Kind, Region
from packlight.moves.chunk.rows import Dims, Reduced, Shape, merged_order, shape_of
from packlight.moves.chunk.rules import MEANS, SIZE_ARGUMENT, is_label_loss
from packlight.torch_internals.dispatch import is_fake

_aten = torch.ops.aten
_NO_REDUCTION, _MEAN_REDUCTION, _SUM_REDUCTION = 0, 1, 2  # as in the C++ enum that nll_loss takes


class RegionWriter:
    """Writes one region.

    Args:
        graph: written to.
        copies: old node -> new node, for all that is outside of the region; results are added.
        region: of the old graph.
        num_chunks: as even as possible; no more than `region.rows` are made.
    """

    def __init__(
        self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], region: Region, num_chunks: int
    ) -> None:
        self.region = region
        self.members = set(region.nodes)
        num_chunks = min(num_chunks, region.rows)
        self.bounds = [region.rows * i // num_chunks for i in range(num_chunks + 1)]
        self.copies = copies
        # What each chunk made of the members: a second run reads what the first one made.
        self.chunks: list[dict[fx.Node, fx.Node]] = [{} for _ in range(num_chunks)]
        self.chunk = self.chunks[0]
        self.slices: dict[tuple[fx.Node, Dims], fx.Node] = {}  # the present chunk's inputs
        self.merged: dict[tuple[fx.Node, Dims], fx.Node] = {}  # inputs with adjacent row dims
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self.sums: dict[fx.Node, fx.Node] = {}
        self.counts: dict[fx.Node, fx.Node] = {}  # nll_loss_forward -> total weight
        values = (leaf for n in region.nodes for leaf in pytree.tree_leaves(n.meta["val"]))
        fake_mode = next(v.fake_mode for v in values if is_fake(v))
        marks = {LATE_KEY: True} if region.kind is Kind.HEAD else {}
        self.writer = GraphWriter(graph, fake_mode, marks)
        self.call, self.view = self.writer.call, self.writer.view

    def write(self, run: Sequence[fx.Node]) -> None:
        """Write one of the region's runs, chunk after chunk.

        A second run begins with the last chunk, as backwards do: what is kept or made again for it
        was made last, and the planner's segments look for that.
        """
        self.merged, self.parts, self.sums = {}, {}, {}
        order = 1 if run == self.region.runs[0] else -1
        spans = list(zip(self.chunks, self.bounds, self.bounds[1:], strict=False))
        for chunk, start, end in spans[::order]:
            self.chunk, self.slices = chunk, {}
            for node in run:
                self._run(node, start, end)
        for node, parts in self.parts.items():
            self.copies[node] = self._whole(node, parts[::order])
        for node, total in self.sums.items():
            self.copies[node] = self._total(node, total)

    def _run(self, node: fx.Node, start: int, end: int) -> None:
        if node.target is operator.getitem:
            parent, index = node.args
            assert isinstance(parent, fx.Node)
            if self.region.shares[node] is Reduced.COUNT:
                self.copies[node] = self.chunk[node] = self._count(parent)
                return
            self._finish(node, self.call(node, operator.getitem, (self.chunk[parent], index)))
            return
        needs = iter(self.region.needs[node])

        def chunk_of(argument: fx.Node) -> fx.Node:
            dims = next(needs)
            if argument in self.members:
                return self.chunk[argument]
            outside = self.copies[argument]
            return outside if dims is None else self._slice(node, argument, dims, start, end)

        args, kwargs = pytree.tree_map_only(fx.Node, chunk_of, (node.args, dict(node.kwargs)))
        target: Any = node.target
        share = self.region.shares[node]
        name = target._schema.name.split("::")[1]
        if name in SIZE_ARGUMENT and isinstance(share, tuple):
            shape = self._chunk_shape(self._sized(node, name), share, start, end)
            args = _replaced(args, SIZE_ARGUMENT[name], list(shape))
        if share is Reduced.SUM:
            target = MEANS.get(target, target)
            if target in MEANS.values() and _is_low_precision(node):
                kwargs = {"dtype": torch.float32, **kwargs}
            if self._can_accumulate(node) and node in self.sums:
                self.sums[node] = self.call(node, _aten.addmm.default, (self.sums[node], *args))
                return
        if is_label_loss(node) and args[3] != _NO_REDUCTION:
            # A chunk's sum of 16-bit losses could overflow: see `_finish`.
            is_small = _is_low_precision(args[0])
            args = _replaced(args, 3, _NO_REDUCTION if is_small else _SUM_REDUCTION)
        if name in ("view", "_unsafe_view", "reshape"):
            self._finish(node, self.view(node, args[0], args[1]))
        else:
            self._finish(node, self.call(node, target, args, kwargs))

    def _finish(self, node: fx.Node, made: fx.Node) -> None:
        """Note what a chunk made of a node: for its own later calls, and for what is outside."""
        self.chunk[node] = made
        if all(user in self.members for user in node.users):
            return
        if self.region.shares[node] is not Reduced.SUM:
            self.parts.setdefault(node, []).append(made)
            return
        if made.meta["val"].dim() > node.meta["val"].dim():
            made = self.call(node, _aten.sum.default, (made,), {"dtype": torch.float32})
        if _is_low_precision(made):
            made = self.call(node, _aten._to_copy.default, (made,), {"dtype": torch.float32})
        if node in self.sums:
            made = self.call(node, _aten.add.Tensor, (self.sums[node], made))
        self.sums[node] = made

    def _can_accumulate(self, node: fx.Node) -> bool:
        """Return whether a sum can grow within the product itself, without a second matrix."""
        return node.target is _aten.mm.default and not _is_low_precision(node)

    def _sized(self, node: fx.Node, name: str) -> Shape:
        if name == "slice_backward":
            return tuple(int(s) for s in node.args[1])  # type: ignore[union-attr, arg-type]
        return shape_of(node)

    def _chunk_shape(self, shape: Shape, dims: Dims, start: int, end: int) -> Shape:
        """Row dims become 1, the last of them the chunk's number of rows."""
        rows = math.prod(shape[d] for d in dims) // self.region.rows
        sizes = list(shape)
        for d in dims:
            sizes[d] = 1
        sizes[dims[-1]] = (end - start) * rows
        return tuple(sizes)

    # -- what a chunk reads, and what becomes of its parts

    def _slice(self, user: fx.Node, source: fx.Node, dims: Dims, start: int, end: int) -> fx.Node:
        """Return the chunk's rows of a tensor from outside."""
        if (source, dims) not in self.slices:
            if (source, dims) not in self.merged:
                self.merged[source, dims] = self._merged(user, source, dims)
            shape = shape_of(source)
            rows = math.prod(shape[d] for d in dims) // self.region.rows
            self.slices[source, dims] = self.call(
                user,
                _aten.slice.Tensor,
                (self.merged[source, dims], dims[-1], start * rows, end * rows),
            )
        return self.slices[source, dims]

    def _merged(self, user: fx.Node, source: fx.Node, dims: Dims) -> fx.Node:
        """Return a tensor with all its rows in the last of its row dims, the others of size 1."""
        made = self.copies[source]
        if len(dims) == 1:
            return made
        shape = shape_of(source)
        order = merged_order(len(shape), dims)
        if order != sorted(order):
            made = self.call(user, _aten.permute.default, (made, order))
        return self.view(user, made, self._chunk_shape(shape, dims, 0, self.region.rows))

    def _whole(self, node: fx.Node, parts: list[fx.Node]) -> fx.Node:
        """Return the parts of all chunks as the one tensor that the rest of the step reads."""
        dims = self.region.shares[node]
        assert isinstance(dims, tuple)
        made = parts[0]
        if len(parts) > 1:
            made = self.call(node, _aten.cat.default, (parts, dims[-1]))
        shape = shape_of(node)
        if len(dims) > 1:
            order = merged_order(len(shape), dims)
            made = self.view(node, made, [shape[d] for d in order])
            if order != sorted(order):
                back = [order.index(d) for d in range(len(shape))]
                made = self.call(node, _aten.permute.default, (made, back))
        return self.writer.with_strides(node, made)

    def _total(self, node: fx.Node, total: fx.Node) -> fx.Node:
        """Return the sum over all chunks, or the mean where that was asked for."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target in MEANS:
            num_terms = math.prod(shape_of(source)) // max(1, math.prod(shape_of(node)))
            total = self.call(node, _aten.div.Scalar, (total, num_terms))
        elif node.target is operator.getitem and source.args[3] == _MEAN_REDUCTION:
            total = self.call(node, _aten.div.Tensor, (total, self._count(source)))
        dtype = node.meta["val"].dtype
        if total.meta["val"].dtype != dtype:
            total = self.call(node, _aten._to_copy.default, (total,), {"dtype": dtype})
        return self.writer.with_strides(node, total)

    def _count(self, loss: fx.Node) -> fx.Node:
        """Return the total weight of a loss's labels, for which no scores are needed."""
        if loss not in self.counts:
            _, target, weight, _, ignored = loss.args
            labels = self.copies[target]  # type: ignore[index]
            dtype = loss.meta["val"][1].dtype
            if weight is None:
                counted = self.call(loss, _aten.ne.Scalar, (labels, ignored))
            else:
                skipped = self.call(loss, _aten.eq.Scalar, (labels, ignored))
                labels = self.call(loss, _aten.masked_fill.Scalar, (labels, skipped, 0))
                weights = self.copies[weight]  # type: ignore[index]
                counted = self.call(loss, _aten.take.default, (weights, labels))
                counted = self.call(loss, _aten.masked_fill.Scalar, (counted, skipped, 0))
            total = self.call(loss, _aten.sum.default, (counted,))
            self.counts[loss] = self.call(loss, _aten._to_copy.default, (total,), {"dtype": dtype})
        return self.counts[loss]


def _replaced(args: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*args[:index], value, *args[index + 1 :])


def _is_low_precision(node: fx.Node) -> bool:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.is_floating_point and dtype.itemsize < 4
