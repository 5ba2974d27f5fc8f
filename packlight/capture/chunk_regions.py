"""Groups of calls whose rows are independent and that can therefore run a few rows at a time.

A region grows from a matrix product whose result is much larger than its input (the logits of a
language model). Everything that touches a tensor of that size must belong to it, forward and
backward, so that only narrow tensors (hidden states, labels, weights, the loss) cross its border.
What has no rule ends the search: a model that also returns its logits has no region there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from packlight.capture.chunk_rows import Dims, Reduced, Share, shape_of, tensor_inputs
from packlight.capture.chunk_rules import flow, is_label_loss, rule_of
from packlight.capture.layers import layers_of_nodes

LATE_KEY = "packlight_late"

# A tensor is wide if it has more than this share of the elements of the region's largest one; the
# input of the product that a region grows from must not be.
WIDE_SHARE = 0.5


@dataclass(frozen=True)
class Region:
    """A group of calls that can run in row chunks.

    Attributes:
        name: the module that the product belongs to.
        nodes: the calls, in the order of the graph.
        rows: how many chunks are possible.
        bytes: size of its largest tensor.
        shares: row dims of each node's value, or that it is a sum over chunks.
        needs: row dims in which each call reads its tensor arguments, None where it reads all.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    rows: int
    bytes: int
    shares: dict[fx.Node, Share]
    needs: dict[fx.Node, tuple[Dims | None, ...]]


def find_heads(module: fx.GraphModule, num_forward_outputs: int) -> list[Region]:
    """Return the regions of a joint graph, those with the largest tensors first; none overlap.

    Args:
        module: a joint graph from AOTAutograd; placeholders are primals then tangents.
        num_forward_outputs: how many of its outputs belong to the forward.

    A region that reaches from forward into backward is what a loss head is. A wide layer within the
    network is none: its backward waits for the loss.
    """
    nodes = list(module.graph.nodes)
    forward = forward_nodes(nodes)
    layers = layers_of_nodes(nodes)
    seeds = [n for n in nodes if n in forward and _is_widening(n) and LATE_KEY not in n.meta]
    seeds.sort(key=_num_elements, reverse=True)
    regions: list[Region] = []
    for seed in seeds:
        if any(seed in region.shares for region in regions):
            continue
        growth = _grown(nodes, forward, seed)
        if growth is not None and not any(n in r.shares for n in growth.shares for r in regions):
            members = tuple(n for n in nodes if n in growth.shares)
            size = max(_num_bytes(n) for n in members)
            name = layers.get(seed, seed.name)
            regions.append(Region(name, members, growth.units, size, growth.shares, growth.needs))
    return sorted(regions, key=lambda r: -r.bytes)


def forward_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the calls that neither need a tangent nor were traced in the backward."""
    after: set[fx.Node] = set()
    for node in nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(i in after for i in node.all_input_nodes):
            after.add(node)
    return {
        n
        for n in nodes
        if n.op == "call_function"
        and n not in after
        and n.meta.get("partitioner_tag") != "is_backward"
    }


def nodes_below(nodes: list[fx.Node], members: Container[fx.Node]) -> set[fx.Node]:
    """Return the nodes that need a member's result and are none themselves."""
    below: set[fx.Node] = set()
    for node in nodes:
        needs_one = any(i in below or i in members for i in node.all_input_nodes)
        if needs_one and node not in members:
            below.add(node)
    return below


def _grown(nodes: list[fx.Node], forward: set[fx.Node], seed: fx.Node) -> _Growth | None:
    """Return the region around a product, in the smallest units that it allows."""
    units = shape_of(seed)[0]
    tried: set[int] = set()
    candidates = {units}
    while candidates - tried:
        units = max(candidates - tried)
        tried.add(units)
        growth = _Growth(nodes, forward, seed, units)
        if growth.grow():
            return growth
        if growth.is_hopeless:
            return None
        for node in growth.shares:  # rows that are cut elsewhere may go together in larger units
            sizes = shape_of(node)
            prefixes = (math.prod(sizes[:k]) for k in range(1, len(sizes)))
            candidates |= {p for p in prefixes if 1 < p < units and units % p == 0}
    return None


class _Growth:
    """One attempt to close a region.

    Attributes:
        is_hopeless: smaller or larger units would not help.
    """

    def __init__(
        self, nodes: list[fx.Node], forward: set[fx.Node], seed: fx.Node, units: int
    ) -> None:
        self.nodes = nodes
        self.forward = forward
        self.units = units
        self.num_wide = _num_elements(seed) * WIDE_SHARE
        self.is_hopeless = False
        self.shares: dict[fx.Node, Share] = {}
        self.needs: dict[fx.Node, tuple[Dims | None, ...]] = {}
        self._pending: list[fx.Node] = []
        self._seed = seed

    def grow(self) -> bool:
        """Take in all wide tensors, then what lies between members, until nothing is missing."""
        if self.units < 2 or not self._take(self._seed, (0,)):
            return False
        while True:
            while self._pending:
                if not self._take_wide_neighbours(self._pending.pop()):
                    return False
            between = self._between()
            if not between:
                return self._is_closed()
            for node in between:
                if node.target is not operator.getitem and rule_of(node) is None:
                    self.is_hopeless = True
                    return False
                if node not in self.shares and not self._take(node):
                    return False

    def _take(self, node: fx.Node, output: Dims | None = None) -> bool:
        """Make a node a member, in the row dims that its members among its neighbours imply."""
        if node.op != "call_function" or node.target is operator.getitem:
            return node in self.shares  # items come with their tuple
        known: list[Dims | None] = []
        for argument in tensor_inputs(node):
            share = self.shares.get(argument)
            if share is Reduced.SUM:
                return False
            known.append(share if isinstance(share, tuple) else None)
        found = flow(node, known, output, self.units)
        if found is None:
            return False
        self.needs[node] = found.inputs
        shares = found.shares(isinstance(node.meta["val"], torch.Tensor))
        if len(shares) == 1:
            self.shares[node] = shares[0]
        else:
            self.shares[node] = Reduced.COUNT  # the tuple itself is never read as a tensor
            for item in node.users:
                self.needs[item] = (None,)
                self.shares[item] = shares[item.args[1]]  # type: ignore[index]
                self._pending.append(item)
        self._pending.append(node)
        return True

    def _take_wide_neighbours(self, node: fx.Node) -> bool:
        share = self.shares[node]
        if isinstance(share, tuple) and self._is_wide(node):
            for user in node.users:
                if user not in self.shares and not self._take(user):
                    return False
        if node.target is operator.getitem:
            return True
        for argument, want in zip(tensor_inputs(node), self.needs[node], strict=True):
            have = self.shares.get(argument)
            if have is None:
                is_free = want is None or argument.op != "call_function"
                if not is_free and self._is_wide(argument) and not self._take(argument, want):
                    return False
            elif have is Reduced.SUM or (isinstance(have, tuple) and have != want):
                return False
            elif have is Reduced.COUNT and want is not None:
                return False
        return True

    def _is_wide(self, node: fx.Node) -> bool:
        return _num_elements(node) > self.num_wide

    def _between(self) -> list[fx.Node]:
        """Return the nodes that are no members although they lie on a path between members."""
        below: set[fx.Node] = set()
        for node in self.nodes:
            if any(i in below or self._has_rows(i) for i in node.all_input_nodes):
                below.add(node)
        above: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if any(u in above or u in self.shares for u in node.users):
                above.add(node)
        return [n for n in self.nodes if n in below and n in above and n not in self.shares]

    def _has_rows(self, node: fx.Node) -> bool:
        return node in self.shares and self.shares[node] is not Reduced.COUNT

    def _is_closed(self) -> bool:
        """Check what the growth could not see while it went on."""
        for node in self.shares:
            if node.target is operator.getitem:
                continue
            for argument, want in zip(tensor_inputs(node), self.needs[node], strict=True):
                have = self.shares.get(argument)
                if have is not None and have is not Reduced.COUNT and have != want:
                    return False
            # Labels are counted before the first chunk.
            if is_label_loss(node) and any(i in self.shares for i in tensor_inputs(node)[1:]):
                return False
        below = nodes_below(self.nodes, self.shares)
        if any(i in below for node in self.shares for i in node.all_input_nodes):
            return False
        # What the forward makes of the results waits for the backward: it must not be much.
        return not any(n in self.forward and self._is_wide(n) for n in below)


def _is_widening(node: fx.Node) -> bool:
    """Whether a node is a product of a narrow matrix, row by row, that gives a wide one."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return False
    rows = tensor_inputs(node)[-2]
    return _num_elements(rows) <= WIDE_SHARE * _num_elements(node)


def _num_elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0


def _num_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return _num_elements(node) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
