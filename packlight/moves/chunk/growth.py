"""How a group of calls grows from one product until nothing wide crosses its border.

Everything that touches a wide tensor must belong to the group, forward and backward, so that only
narrow tensors (hidden states, labels, weights, sums) cross its border. What has no rule ends the
growth: a model that also returns its logits has no group there.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence

import torch
from torch import fx

from packlight.moves.chunk.rows import Dims, Reduced, Share, tensor_inputs
from packlight.moves.chunk.rules import flow, is_label_loss, rule_of
from packlight.moves.chunk.span import Span

# A tensor is wide if it has more than this share of the elements of the group's largest one; the
# input of the product that a group grows from must not be.
WIDE_SHARE = 0.5


class Growth:
    """One attempt to close a region.

    Args:
        spans: the parts of the step that members run in: what lies on a path between members of
            one part is a member, too.
        seed: the product to grow from, its rows in its first dim.
        units: number of units.

    Attributes:
        shares, needs: see `Region`.
        is_hopeless: smaller or larger units would not help.
    """

    def __init__(self, spans: Sequence[Span], seed: fx.Node, units: int) -> None:
        self.spans = spans
        self.units = units
        self.num_wide = num_elements(seed) * WIDE_SHARE
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
                self._join()
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
        if isinstance(share, tuple) and self.is_wide(node):
            for user in node.users:
                if user not in self.shares and not self._take(user):
                    return False
        if node.target is operator.getitem:
            return True
        for argument, want in zip(tensor_inputs(node), self.needs[node], strict=True):
            have = self.shares.get(argument)
            if have is None:
                is_free = want is None or argument.op != "call_function"
                if not is_free and self.is_wide(argument) and not self._take(argument, want):
                    return False
            elif have is Reduced.SUM or (isinstance(have, tuple) and have != want):
                return False
            elif have is Reduced.COUNT and want is not None:
                return False
        return True

    def is_wide(self, node: fx.Node) -> bool:
        """Return whether a node's tensor is about as large as the region's largest."""
        return num_elements(node) > self.num_wide

    def _between(self) -> list[fx.Node]:
        """Return the nodes that are no members although they lie on a path between members."""
        with_rows = [n for n in self.shares if self._has_rows(n)]
        return [n for span in self.spans for n in span.between(self.shares, with_rows)]

    def _join(self) -> None:
        """Take in what only joins members' results: then one tensor leaves the region, not two."""
        for span in self.spans:
            users = [u for n in span.ordered(self.shares) for u in n.users]
            while users:
                node = users.pop()
                inputs = node.all_input_nodes
                if (
                    node in span
                    and node not in self.shares
                    and all(i in span and self._has_rows(i) for i in inputs)
                    and all(len(i.users) == 1 for i in inputs)
                    and num_elements(node) <= sum(map(num_elements, inputs))
                    and not self.is_wide(node)
                    and self._take(node)
                ):
                    users += node.users

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
        return not any(span.between(self.shares, self.shares) for span in self.spans)


def nodes_below(nodes: Sequence[fx.Node], members: Container[fx.Node]) -> set[fx.Node]:
    """Return those of some nodes that need the result of a member among them and are none."""
    within = set(nodes)
    below: set[fx.Node] = set()
    for node in nodes:
        if node not in members and any(
            i in below or (i in within and i in members) for i in node.all_input_nodes
        ):
            below.add(node)
    return below


def num_elements(node: fx.Node) -> int:
    """Return the size of a node's tensor; 0 for what is no tensor."""
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0
