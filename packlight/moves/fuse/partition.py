"""Which calls of a step become one kernel.

Groups of calls grow along buffers that one call makes and another reads: those buffers need not be
in memory any more. A group stays closed (no path leaves it and comes back), belongs to one phase,
and goes through one number of elements. In the forward it has one large result: what the backward
wants of it, and what is recomputed, is then still the planner's choice, buffer by buffer. In the
backward nothing is chosen any more, and every buffer less is a gain. Nor does a forward's group
read again what a sum over all of it was taken of: that takes a second pass anyhow, and apart from
the sum that pass is cheaper to run again.

A call that is made of several (a softmax that minds rows without any score, a batch norm's
backward) allocates what those hand to one another, and some have no overload that writes over what
they read: each of those is a kernel by itself, if need be.

What was taken apart (`split.py`) has calls on few elements, too: those go with what they read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from packlight.capture.joint import JointStep
from packlight.costs.measure import in_place_call
from packlight.moves.fuse.fusable import Kind, domain, kind_of, sums_over_rows
from packlight.step import Operation, OperationKind, Phase

# Smaller tensors are not worth a kernel of their own.
MIN_ELEMENTS = 4096
# In the metadata of calls that are parts of one: its name.
SPLIT_KEY = "packlight_split"
# Larger kernels take long to compile, and spill registers.
MOST_MEMBERS = 32
# A result is large if it is at least this share of what its group goes through.
LARGE = 1 / 4


@dataclass(frozen=True)
class Group:
    """Calls that become one kernel.

    Attributes:
        operations: in order.
        outputs: buffers that others read, or that are results of the step; the largest first.
        saved_bytes: of buffers that are not in memory any more.
    """

    operations: tuple[int, ...]
    outputs: tuple[int, ...]
    saved_bytes: int


MayJoin = Callable[[fx.Node, Kind], bool]


def domain_of(step: JointStep, operation: Operation, may_join: MayJoin) -> int | None:
    """Return how many elements an operation goes through, None if no kernel can contain it.

    Few elements in a part of a call are as good as none: 0.
    """
    if operation.kind is not OperationKind.COMPUTE or not operation.can_recompute:
        return None
    node = step.node_of_operation[operation.id]
    kind = kind_of(node)
    if kind is None or not may_join(node, kind):
        return None
    if domain(node) < MIN_ELEMENTS:
        return 0 if SPLIT_KEY in node.meta else None
    return domain(node)


def groups_of(step: JointStep, may_join: MayJoin) -> list[Group]:
    """Return the groups of a step: two calls or more, or one that takes more room than a kernel.

    Args:
        step: as it was read.
        may_join: whether a call may be part of a kernel.
    """
    return _Partition(step, may_join).groups()


class _Partition:
    def __init__(self, step: JointStep, may_join: MayJoin) -> None:
        self.step, self.graph = step, step.graph
        self.maker = {b: o.id for o in self.graph.operations for b in o.creates}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for operation in self.graph.operations:
            for buffer in operation.reads:
                self.readers[buffer].append(operation.id)
        self.results = {*self.graph.forward_outputs, *self.graph.outputs}
        self.domain: dict[int, int] = {}
        for operation in self.graph.operations:
            size = domain_of(step, operation, may_join)
            if size is not None:
                self.domain[operation.id] = size
        self.leader = {operation.id: operation.id for operation in self.graph.operations}
        self.members = {operation: [operation] for operation in self.leader}

    def groups(self) -> list[Group]:
        """Grow groups until nothing changes."""
        while any([self._grow(consumer) for consumer in self.domain]):
            pass
        found = (sorted(self.members[o]) for o in self.domain if self.leader[o] == o)
        return [
            self._group(members) for members in found
            if len(members) > 1 or self._is_wasteful(members[0])
        ]

    def _is_wasteful(self, operation: int) -> bool:
        """Whether a call allocates what a kernel has in registers, or could write over."""
        node, size = self.step.node_of_operation[operation], self.domain[operation]
        if self.graph.operations[operation].workspace_bytes >= LARGE * size > 0:
            return True
        target, num_tensors = node.target, len(node.all_input_nodes)
        assert isinstance(target, torch._ops.OpOverload)
        return kind_of(node) is Kind.POINTWISE and self._could_write_over(operation) and not any(
            in_place_call(target, index, len(node.args)) for index in range(num_tensors)
        )

    def _could_write_over(self, operation: int) -> bool:
        """Whether an operation reads something as large as its only result, in the same dtype."""
        one, buffers = self.graph.operations[operation], self.graph.buffers
        node = self.step.node_of_operation[operation]
        dtype = node.meta["val"].dtype
        return len(one.creates) == 1 and any(
            i.meta["val"].dtype is dtype and i in self.step.buffer_of_node
            and buffers[b := self.step.buffer_of_node[i]].bytes == buffers[one.creates[0]].bytes
            and not buffers[b].kind.is_resident
            for i in node.all_input_nodes
        )

    def _grow(self, consumer: int) -> bool:
        """Join a call with those that made what it reads."""
        has_grown = False
        for buffer in self.graph.operations[consumer].reads:
            producer = self.maker.get(buffer)
            if producer is None or producer not in self.domain:
                continue
            one, other = self.leader[producer], self.leader[consumer]
            if one != other and self._can_join(one, other):
                self.members[one] += self.members.pop(other)
                for member in self.members[one]:
                    self.leader[member] = one
                has_grown = True
        return has_grown

    def _can_join(self, one: int, other: int) -> bool:
        first, second = self.graph.operations[one], self.graph.operations[other]
        union = [*self.members[one], *self.members[other]]
        domains = {self.domain[o] for o in union} - {0}
        if first.phase is not second.phase or len(domains) > 1:
            return False
        if len(union) > MOST_MEMBERS or not self._is_closed(union):
            return False
        if first.phase is not Phase.FORWARD:
            return True
        sizes = [self.graph.buffers[b].bytes for b in self._outputs(union)]
        limit = LARGE * max(domains, default=0)  # in bytes, of the narrowest type
        return sum(size >= limit for size in sizes) <= 1 and not self._takes_two_passes(union)

    def _takes_two_passes(self, members: Iterable[int]) -> bool:
        """Whether a call on all elements reads what was summed over all of them."""
        below: set[int] = set()
        for member in sorted(members):
            operation = self.graph.operations[member]
            is_below = not below.isdisjoint(operation.reads)
            if is_below and self.domain[member]:
                return True
            if is_below or sums_over_rows(self.step.node_of_operation[member]):
                below.update(operation.creates)
        return False

    def _outputs(self, members: Iterable[int]) -> list[int]:
        inside = set(members)
        created = [b for o in members for b in self.graph.operations[o].creates]
        return [
            b for b in created
            if b in self.results or any(reader not in inside for reader in self.readers[b])
        ]

    def _is_closed(self, members: Iterable[int]) -> bool:
        """Whether no path leaves a set of calls, through other groups, and comes back."""
        inside = set(members)
        last = max(inside)
        seen: set[int] = set()
        stack = [
            reader for o in inside for b in self.graph.operations[o].creates
            for reader in self.readers[b] if reader not in inside
        ]
        while stack:
            group = self.leader[stack.pop()]
            if group in seen:
                continue
            seen.add(group)
            members_of = self.members[group]
            if min(members_of) > last:
                continue
            for operation in members_of:
                for buffer in self.graph.operations[operation].creates:
                    for reader in self.readers[buffer]:
                        if reader in inside:
                            return False
                        stack.append(reader)
        return True

    def _group(self, members: list[int]) -> Group:
        outputs = self._outputs(members)
        size = {b: self.graph.buffers[b].bytes for o in members
                for b in self.graph.operations[o].creates}
        outputs.sort(key=lambda b: (-size[b], b))
        saved_bytes = sum(size.values()) - sum(size[b] for b in outputs)
        return Group(tuple(members), tuple(outputs), saved_bytes)
