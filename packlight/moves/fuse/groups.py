"""The groups of a step's calls with the kernels that can run in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Self

from torch import fx

from packlight.capture.dropout import with_masks_apart
from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Read
from packlight.costs.profiler import CallProfiler
from packlight.kernels.kernel import CompileError, Kernel, kernel_of
from packlight.moves.fuse.bits import equal_results, keeping_bits
from packlight.moves.fuse.fusable import Kind, domain, kind_of, literals
from packlight.moves.fuse.partition import MIN_ELEMENTS, SPLIT_KEY, MayJoin, groups_of
from packlight.moves.fuse.reread import REREAD_KEY, with_rereads
from packlight.moves.fuse.rewrite import GroupGraph, fused
from packlight.moves.fuse.split import with_parts
from packlight.moves.fuse.verdicts import Verdicts

# Kernels that take more than so many times as long as their calls, each alone, are not used. Alone
# they find what they read in the cache, and a kernel's advantage is that it reads less.
MOST_SECONDS = 1.1
# Each takes seconds to compile.
MOST_KERNELS = 64


class Groups:
    """The groups of a joint graph's calls, each compiled.

    Args:
        module: the joint graph.
        read: reads it, and what is made of it.
        is_exact: groups of such pointwise calls alone that round in a kernel as they do in eager
            PyTorch.
        left_out: names of kernels that are not used.

    Attributes:
        left_out: names of kernels that are not used.
        step: the graph, as it was read, with what the backward makes again in its kernels.
        kernels: that are used.
        failures: why other groups run call by call -> how many.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        read: Read,
        *,
        is_exact: bool,
        left_out: Collection[str] = (),
    ) -> None:
        self.is_exact, self.left_out = is_exact, frozenset(left_out)
        self._plain = read(with_masks_apart(module))
        self._verdicts = Verdicts(self._plain.device)
        may_join = self._may_join(self._plain)
        banned: set[str] = set()
        while True:
            apart = read(with_parts(self._plain, may_join, banned))
            self.step = read(with_rereads(apart, may_join, banned))
            self.kernels: dict[GroupGraph, Kernel] = {}
            self.failures: Counter[str] = Counter()
            self._compile(self._found(may_join, left_out))
            lost = self._for_nothing()
            if not lost:
                return
            banned |= lost

    def _found(self, may_join: MayJoin, left_out: Collection[str]) -> list[GroupGraph]:
        """Return the groups; of those left out, what is left of them without reductions."""

        def grouped(may_join: MayJoin) -> list[GroupGraph]:
            return [
                GroupGraph(self.step, group, rounds_as_eager=self.is_exact)
                for group in groups_of(self.step, may_join)
            ]

        groups = grouped(may_join)
        rest = {n for graph in groups if graph.name in left_out for n in graph.members}
        if rest:
            groups += grouped(
                lambda n, kind: n in rest and kind is Kind.POINTWISE and may_join(n, kind)
            )
        return [graph for graph in groups if graph.name not in left_out]

    def _compile(self, graphs: Sequence[GroupGraph]) -> None:
        """Compile groups, those that save most where there are many."""
        saved_bytes: Counter[str] = Counter()
        for graph in graphs:
            saved_bytes[graph.name] += graph.group.saved_bytes
        names = {name for name, _ in saved_bytes.most_common(MOST_KERNELS)}
        for graph in graphs:
            if graph.name not in names:
                self.failures[f"no more than {MOST_KERNELS} kernels are compiled"] += 1
                continue
            try:
                self.kernels[graph] = kernel_of(graph.region)
            except CompileError as error:
                self.failures[f"they do not compile: {error}"] += 1

    def _for_nothing(self) -> set[str]:
        """Return the names of calls that are made again, or taken apart, outside of kernels."""
        inside = {node for graph in self.kernels for node in graph.members}
        outside = [node for node in self.step.node_of_operation if node not in inside]
        again = {node.meta[REREAD_KEY] for node in outside if REREAD_KEY in node.meta}
        return again or {
            node.meta[SPLIT_KEY] for node in outside
            if SPLIT_KEY in node.meta and domain(node) >= MIN_ELEMENTS
        }

    def _may_join(self, step: JointStep) -> MayJoin:
        if not self.is_exact:
            return lambda node, kind: True
        pointwise = [
            node for node in step.node_of_operation
            if node.op == "call_function" and kind_of(node) is Kind.POINTWISE
            and domain(node) >= MIN_ELEMENTS
        ]
        kept = keeping_bits(step, pointwise)
        return lambda node, kind: kind is Kind.POINTWISE and literals(node) in kept

    @classmethod
    def worth_it(
        cls, module: fx.GraphModule, read: Read, *, is_exact: bool, may_be_slow: bool = False
    ) -> Self:
        """Return the groups whose kernels are worth it.

        Args:
            module: the joint graph.
            read: reads it, and what is made of it.
            is_exact: see the class.
            may_be_slow: for the bytes that they save, also those slower than their calls.
        """
        groups = cls(module, read, is_exact=is_exact)
        while lost := groups.not_worth_it(may_be_slow):  # without them, groups may be others
            groups = cls(module, read, is_exact=is_exact, left_out=groups.left_out | lost)
        return groups

    @property
    def names(self) -> set[str]:
        """The names of all kernels; equal groups share one."""
        return {graph.name for graph in self.kernels}

    def module(self) -> fx.GraphModule:
        """Return the joint graph with its groups in kernels."""
        return fused(self.step, self.kernels)

    def why_none(self) -> str:
        """Return why there are no kernels."""
        if self.left_out:
            reason = "faster in one kernel" + (" with the same bits" if self.is_exact else "")
            return f"no group of calls is {reason}"
        for reason, count in self.failures.items():
            return f"{count} groups of calls: {reason}"
        return "no calls that a kernel could contain read one another's results"

    def not_worth_it(self, may_be_slow: bool = False) -> set[str]:
        """Return the names of kernels that change bits, or are slower than their calls."""
        found: set[str] = set()
        if self.is_exact:
            one_of = {graph.name: (graph, kernel) for graph, kernel in self.kernels.items()}
            found = {
                name for name, (graph, kernel) in one_of.items()
                if not all(equal_results(kernel, graph.region))
            }
        for family in () if may_be_slow else self._families():
            if sum(self._shares(family)) > MOST_SECONDS:
                found |= {graph.name for graph in family}
        self._verdicts.save()
        return found

    def tell_expected(self, profiler: CallProfiler) -> None:
        """Have kernels' times in a step estimated by what is known of their calls there."""
        for family in self._families():
            graph = self._plain.graph
            seconds = sum(graph.operations[o].seconds for o in self._calls(family))
            for member, share in zip(family, self._shares(family), strict=True):
                profiler.expect_in_step(self.kernels[member].overload, share * seconds)

    def _families(self) -> list[list[GroupGraph]]:
        """Return kernels together that share a call: taken apart, or made again by the backward."""
        families: list[tuple[set[str], list[GroupGraph]]] = []
        for graph in self.kernels:
            calls, members = {_origin(node) for node in graph.members}, [graph]
            for family in [f for f in families if not calls.isdisjoint(f[0])]:
                families.remove(family)
                calls, members = calls | family[0], [*family[1], *members]
            families.append((calls, members))
        return [members for _, members in families]

    def _shares(self, family: Sequence[GroupGraph]) -> list[float]:
        """Return how long each kernel of a family takes, of what the family's calls take."""
        kernels = [(self.kernels[graph], graph.region) for graph in family]
        return self._verdicts.shares(kernels, [self._plain.call(o) for o in self._calls(family)])

    def _calls(self, family: Sequence[GroupGraph]) -> list[int]:
        """Return the operations of the plain step that do not run where a family's kernels do."""
        names = {_origin(node) for graph in family for node in graph.members} - self._running()
        return [
            o.id for o in self._plain.graph.operations
            if self._plain.node_of_operation[o.id].name in names
        ]

    def _running(self) -> set[str]:
        """Return the names of calls that run outside of kernels, made again inside or not."""
        inside = {node for graph in self.kernels for node in graph.members}
        return {n.name for n in self.step.node_of_operation if n not in inside and n.users}


def _origin(node: fx.Node) -> str:
    """Return the name of the call of the plain step that a call is, makes again or is a part of."""
    name: str = node.meta.get(SPLIT_KEY) or node.meta.get(REREAD_KEY) or node.name
    return name
