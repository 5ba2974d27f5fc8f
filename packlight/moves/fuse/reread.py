"""What the backward reads of the forward, made again inside the kernels that read it.

A cast, a softmax, an activation: where all that reads one in the backward can be part of a kernel,
the kernel reads what it was made of, and makes it again in registers. That takes no pass over
memory, and what is kept for the backward is the narrower of the two. (Inductor's partitioner does
the same for what it fuses; here it is one more form of the graph, which the planner is free to
take.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.joint import JointStep
from packlight.capture.writer import GraphWriter
from packlight.moves.fuse.partition import LARGE, MayJoin, domain_of
from packlight.moves.fuse.rewrite import is_view
from packlight.step import OperationKind, Phase
from packlight.torch_internals.aot import TRACED_IN_BACKWARD
from packlight.torch_internals.calling import copy_calling_convention

# In a node's metadata: the name of the forward's call that it makes again.
REREAD_KEY = "packlight_reread"

def with_rereads(step: JointStep, may_join: MayJoin, banned: Collection[str]) -> fx.GraphModule:
    """Return a joint graph whose backward makes some values again; the step's if there are none.

    Args:
        step: the graph, as it was read; stays as it is.
        may_join: whether a call may be part of a kernel.
        banned: names of calls that are not made again.
    """
    chosen = _chosen(step, may_join, banned)
    return _Writer(step, chosen).module() if chosen else step.module


def _chosen(step: JointStep, may_join: MayJoin, banned: Collection[str]) -> set[fx.Node]:
    """Return the forward's calls whose readers in the backward make them again, last ones first."""
    graph = step.graph

    # Per buffer: what its readers go through, None for those that no kernel can contain.
    forward: dict[int, set[int | None]] = defaultdict(set)
    backward: dict[int, set[int | None]] = defaultdict(set)
    for operation in graph.operations:
        readers = forward if operation.phase is Phase.FORWARD else backward
        for buffer in operation.reads:
            readers[buffer].add(domain_of(step, operation, may_join))
    results = {*graph.forward_outputs, *graph.outputs}
    chosen: set[fx.Node] = set()
    for operation in reversed(graph.operations[: graph.num_forward]):
        node, size = step.node_of_operation[operation.id], domain_of(step, operation, may_join)
        if not size or node.name in banned or len(operation.creates) != 1:
            continue
        (made,) = operation.creates
        large = [b for b in operation.reads if graph.buffers[b].bytes >= LARGE * size]
        if len(large) != 1 or made in results or backward[made] != {size}:
            continue
        source, result = graph.buffers[large[0]], graph.buffers[made]
        is_kept = source.kind.is_resident or bool(backward[source.id])
        is_never_whole = forward[made] == {size}
        if source.bytes < result.bytes or (
            source.bytes == result.bytes and (is_kept or is_never_whole)
        ):
            chosen.add(node)
            for buffer in operation.reads:
                backward[buffer].add(size)
    return chosen


class _Writer:
    """Copies a joint graph; readers in the backward are given values of their own."""

    def __init__(self, step: JointStep, chosen: set[fx.Node]) -> None:
        self.step, self.chosen = step, chosen
        self.late = {
            step.node_of_operation[o.id] for o in step.graph.operations
            if o.phase is not Phase.FORWARD and o.kind is OperationKind.COMPUTE
        }
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.writer = GraphWriter(self.graph, fake_mode_of(step.module), TRACED_IN_BACKWARD)

    def module(self) -> fx.GraphModule:
        """Return the copy."""
        module = self.step.module
        for node in module.graph.nodes:
            values = self.copies
            if node in self.late:
                own: dict[fx.Node, fx.Node] = {}
                values = {i: self._value(i, own) for i in node.all_input_nodes}
            self.copies[node] = self.graph.node_copy(node, values.__getitem__)
        copy_calling_convention(module.graph, self.graph)
        self.graph.lint()
        rewritten = GraphData(module, self.graph)
        rewritten.meta.update(module.meta)
        return rewritten

    def _value(self, node: fx.Node, own: dict[fx.Node, fx.Node]) -> fx.Node:
        """Return a value for one reader: made again for it, or the one that is there."""
        if node not in own:
            own[node] = self.copies[node] if not self._is_reread(node) else self._again(node, own)
        return own[node]

    def _is_reread(self, node: fx.Node) -> bool:
        is_looked_through = is_view(self.step, node) and node not in self.chosen
        return node in self.chosen or (
            is_looked_through and any(map(self._is_reread, node.all_input_nodes))
        )

    def _again(self, node: fx.Node, own: dict[fx.Node, fx.Node]) -> fx.Node:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda i: self._value(i, own)
        )
        made = self.writer.call(node, node.target, args, kwargs)
        if node in self.chosen:
            made.meta[REREAD_KEY] = node.name
        return made
