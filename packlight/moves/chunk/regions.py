"""Groups of calls whose rows are independent and that can therefore run a few rows at a time.

A region grows from a matrix product whose result is much larger than its input: the logits of a
language model, the hidden layer of an MLP, the scores of attention. How far it must grow decides
what it is. A loss head reaches from the forward into the backward without a gap: its chunks run
forward and backward at once. Layers in the midst of the network have a part in the forward and one
in the backward, each in chunks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from packlight.capture.layers import layers_of_nodes
from packlight.capture.marks import LATE_KEY
from packlight.capture.phases import forward_calls
from packlight.moves.chunk.growth import WIDE_SHARE, Growth, nodes_below, num_elements
from packlight.moves.chunk.rows import Dims, Share, shape_of, tensor_inputs
from packlight.moves.chunk.span import Span


class Kind(StrEnum):
    """What a region is, by the product that it grows from."""

    HEAD = "loss head"
    MLP = "MLP"
    ATTENTION = "attention layer"


@dataclass(frozen=True, eq=False)
class Region:
    """A group of calls that can run in row chunks.

    Attributes:
        kind: what it is.
        name: the module that the product belongs to.
        runs: the calls in the order of the graph. All chunks go through the first run, then (later
            in the step) through the second, where there are two.
        rows: how many chunks are possible.
        bytes: size of its largest tensor.
        shares: row dims of each node's value, or that it is a sum over chunks.
        needs: row dims in which each call reads its tensor arguments, None where it reads all.
    """

    kind: Kind
    name: str
    runs: tuple[tuple[fx.Node, ...], ...]
    rows: int
    bytes: int
    shares: dict[fx.Node, Share]
    needs: dict[fx.Node, tuple[Dims | None, ...]]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All calls of the region."""
        return tuple(n for run in self.runs for n in run)


def find_heads(module: fx.GraphModule, num_forward_outputs: int) -> list[Region]:
    """Return the loss heads of a joint graph, those with the largest tensors first; none overlap.

    Args:
        module: a joint graph from AOTAutograd; placeholders are primals then tangents.
        num_forward_outputs: how many of its outputs belong to the forward.

    A region that reaches from forward into backward is what a loss head is. A wide layer within the
    network is none: its backward waits for the loss.
    """
    nodes = list(module.graph.nodes)
    forward = forward_calls(nodes)

    def is_head(growth: Growth) -> bool:
        # What the forward makes of the results waits for the backward: it must not be much.
        below = nodes_below(nodes, growth.shares)
        return not any(n in forward and growth.is_wide(n) for n in below)

    targets = {torch.ops.aten.mm.default: Kind.HEAD, torch.ops.aten.addmm.default: Kind.HEAD}
    return _grown_regions(nodes, forward, (Span(nodes),), targets, is_head)


def find_row_groups(module: fx.GraphModule, num_forward_outputs: int) -> list[Region]:
    """Return the layers of a joint graph that can run in row chunks, those of most bytes first.

    Args:
        module: a joint graph from AOTAutograd, its loss head whole or in chunks already.
        num_forward_outputs: how many of its outputs belong to the forward.

    MLPs whose hidden layer is wider than their input, attention whose scores are computed one by
    one (its rows are batch and heads). Calls that draw random numbers are in no group: chunk by
    chunk they would draw others. Loss heads are left to `find_heads`.
    """
    nodes = list(module.graph.nodes)
    forward = forward_calls(nodes)
    early = [n for n in nodes if n in forward and LATE_KEY not in n.meta]
    is_early = set(early)
    rest = [n for n in nodes if n.op == "call_function" and n not in is_early]
    in_heads = {n for head in find_heads(module, num_forward_outputs) for n in head.nodes}
    targets = {
        torch.ops.aten.mm.default: Kind.MLP,
        torch.ops.aten.addmm.default: Kind.MLP,
        torch.ops.aten.bmm.default: Kind.ATTENTION,
    }

    def is_no_head(growth: Growth) -> bool:
        return not in_heads.intersection(growth.shares)

    return _grown_regions(nodes, early, (Span(early), Span(rest)), targets, is_no_head)


def _grown_regions(
    nodes: list[fx.Node],
    seeds: Iterable[fx.Node],
    spans: Sequence[Span],
    kinds: dict[torch._ops.OpOverload, Kind],
    is_accepted: Callable[[Growth], bool],
) -> list[Region]:
    """Return what grows from products among some nodes, largest first; no two overlap."""
    layers = layers_of_nodes(nodes)
    position = {n: i for i, n in enumerate(nodes)}
    products = [n for n in seeds if n.target in kinds and LATE_KEY not in n.meta]
    products = [n for n in products if _is_widening(n)]
    products.sort(key=lambda n: (-num_elements(n), position[n]))
    found: list[Region] = []
    taken: set[fx.Node] = set()
    for product in products:
        if product in taken:
            continue
        growth = _grown(spans, product)
        if growth is None or taken.intersection(growth.shares) or not is_accepted(growth):
            continue
        taken.update(growth.shares)
        runs = [tuple(span.ordered(growth.shares)) for span in spans]
        region = Region(
            kinds[product.target],  # type: ignore[index]
            layers.get(product, product.name),
            tuple(run for run in runs if run),
            growth.units,
            max(map(_num_bytes, growth.shares)),
            growth.shares,
            growth.needs,
        )
        found.append(region)
    return sorted(found, key=lambda region: -region.bytes)


def _grown(spans: Sequence[Span], seed: fx.Node) -> Growth | None:
    """Return the region around a product, in the smallest units that it allows."""
    units = shape_of(seed)[0]
    tried: set[int] = set()
    candidates = {units}
    while candidates - tried:
        units = max(candidates - tried)
        tried.add(units)
        growth = Growth(spans, seed, units)
        if growth.grow():
            return growth
        if growth.is_hopeless:
            return None
        for node in growth.shares:  # rows that are cut elsewhere may go together in larger units
            sizes = shape_of(node)
            prefixes = (math.prod(sizes[:k]) for k in range(1, len(sizes)))
            candidates |= {p for p in prefixes if 1 < p < units and units % p == 0}
    return None


def _is_widening(node: fx.Node) -> bool:
    """Whether a node is a product of a narrow matrix, row by row, that gives a wide one."""
    rows = tensor_inputs(node)[-2]
    return num_elements(rows) <= WIDE_SHARE * num_elements(node)


def _num_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return num_elements(node) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
