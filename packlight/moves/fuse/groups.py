"""The groups of a step's calls with the kernels that can run in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import fx

from packlight.capture.dropout import with_masks_apart
from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Measure, read_joint_graph
from packlight.kernels.kernel import CompileError, Kernel, kernel_of
from packlight.moves.fuse.bits import equal_results, keeping_bits
from packlight.moves.fuse.fusable import Kind, domain, kind_of, literals
from packlight.moves.fuse.partition import MIN_ELEMENTS, MayJoin, groups_of
from packlight.moves.fuse.reread import REREAD_KEY, with_rereads
from packlight.moves.fuse.rewrite import GroupGraph, fused
from packlight.moves.fuse.verdicts import Verdicts

# A kernel that takes more than so many times as long as its calls, each alone, is not used. Alone
# they find what they read in the cache, and a kernel's advantage is that it reads less.
MOST_SECONDS = 1.1
# Each takes seconds to compile.
MOST_KERNELS = 64


class Groups:
    """The groups of a joint graph's calls, each compiled.

    Args:
        module: the joint graph.
        num_forward_outputs: how many of its results are the forward's.
        measure: observes calls.
        is_exact: groups of such pointwise calls alone that round in a kernel as they do in eager
            PyTorch.
        left_out: names of kernels that are not used.

    Attributes:
        step: the graph, as it was read, with what the backward makes again in its kernels.
        kernels: that are used.
        failures: why other groups run call by call -> how many.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        num_forward_outputs: int,
        measure: Measure,
        *,
        is_exact: bool,
        left_out: Collection[str] = (),
    ) -> None:
        self.is_exact = is_exact

        def read(module: fx.GraphModule) -> JointStep:
            return read_joint_graph(module, num_forward_outputs, measure)

        plain = read(with_masks_apart(module))
        may_join = self._may_join(plain)
        banned: set[str] = set()
        while True:
            self.step = read(with_rereads(plain, may_join, banned))
            self.kernels: dict[GroupGraph, Kernel] = {}
            self.failures: Counter[str] = Counter()
            found = (
                GroupGraph(self.step, group, rounds_as_eager=is_exact)
                for group in groups_of(self.step, may_join)
            )
            self._compile([graph for graph in found if graph.name not in left_out])
            lost = self._made_again_for_nothing()
            if not lost:
                return
            banned |= lost

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

    def _made_again_for_nothing(self) -> set[str]:
        """Return the names of calls that the backward makes again outside of kernels."""
        inside = {node for graph in self.kernels for node in graph.members}
        nodes = (node for node in self.step.module.graph.nodes if node not in inside)
        return {node.meta[REREAD_KEY] for node in nodes if REREAD_KEY in node.meta}

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

    @property
    def names(self) -> set[str]:
        """The names of all kernels; equal groups share one."""
        return {graph.name for graph in self.kernels}

    def module(self) -> fx.GraphModule:
        """Return the joint graph with its groups in kernels."""
        return fused(self.step, self.kernels)

    def why_none(self) -> str:
        """Return why there are no kernels."""
        for reason, count in self.failures.items():
            return f"{count} groups of calls: {reason}"
        return "no calls that a kernel could contain read one another's results"

    def not_worth_it(self) -> set[str]:
        """Return the names of kernels that are slower than their calls, or change bits."""
        verdicts = Verdicts(self.step.device)
        one_of = {graph.name: (graph, kernel) for graph, kernel in self.kernels.items()}
        found = {
            name for name, (graph, kernel) in one_of.items()
            if (self.is_exact and not all(equal_results(kernel, graph.region)))
            or verdicts.relative_seconds(kernel, graph.region) > MOST_SECONDS
        }
        verdicts.save()
        return found
