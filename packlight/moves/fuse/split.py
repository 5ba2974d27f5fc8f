"""Forward calls taken apart into a reduction and what is done with its results.

A batch norm goes through its images twice: for the statistics, and to apply them. As two kernels
that takes no more passes over memory, the second one takes in what follows, and is all that runs
when images are made again for the backward. Of a log-softmax a row's maximum and sum are what takes
the time: kept, they let the backward make it again in a single pass.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.joint import JointStep
from packlight.capture.writer import GraphWriter
from packlight.moves.fuse.partition import SPLIT_KEY, MayJoin, domain_of
from packlight.step import OperationKind, Phase
from packlight.torch_internals.calling import copy_calling_convention
from packlight.torch_internals.inductor import taken_apart

# Names of operators, as `str` has them.
_TARGETS = {"aten._log_softmax.default", "aten._native_batch_norm_legit_functional.default"}


def with_parts(step: JointStep, may_join: MayJoin, banned: Collection[str]) -> fx.GraphModule:
    """Return a joint graph with some calls taken apart; the step's if there are none.

    Args:
        step: the graph, as it was read; stays as it is.
        may_join: whether a call may be part of a kernel.
        banned: names of calls that stay whole.
    """
    chosen = {
        node for node in _read_by_the_backward(step)
        if str(node.target) in _TARGETS and node.name not in banned
    }
    chosen = {
        step.node_of_operation[o.id] for o in step.graph.operations
        if o.phase is Phase.FORWARD and o.kind is OperationKind.COMPUTE
        and step.node_of_operation[o.id] in chosen and domain_of(step, o, may_join) is not None
    }
    if not chosen:
        return step.module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, Any] = {}
    writer = GraphWriter(graph, fake_mode_of(step.module), {})
    for node in step.module.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if node in chosen:
            parts[node] = _written(node, copies, writer)
            if isinstance(parts[node], fx.Node):
                copies[node] = parts[node]
        elif source in parts:
            copies[node] = parts[source][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    copy_calling_convention(step.module.graph, graph)
    writer.erase_unused()
    graph.lint()
    rewritten = GraphData(step.module, graph)
    rewritten.meta.update(step.module.meta)
    return rewritten


def _read_by_the_backward(step: JointStep) -> set[fx.Node]:
    read = {
        b for o in step.graph.operations if o.phase is not Phase.FORWARD for b in o.reads
    }
    return {
        step.node_of_operation[o.id] for o in step.graph.operations if read & set(o.creates)
    }


def _written(node: fx.Node, copies: dict[fx.Node, fx.Node], writer: GraphWriter) -> Any:
    """Write the parts of a call; return what stands for its result, or for each of them."""
    apart = taken_apart(node)
    given = iter(node.all_input_nodes)
    made: dict[fx.Node, Any] = {}
    for part in apart.graph.nodes:
        if part.op == "placeholder":
            made[part] = copies[next(given)]
        elif part.op == "output":
            return fx.map_arg(part.args[0], made.__getitem__)
        else:
            args, kwargs = fx.map_arg((part.args, dict(part.kwargs)), made.__getitem__)
            call = writer.call(node, part.target, args, kwargs, name=f"{node.name}_part")
            call.meta[SPLIT_KEY] = node.name
            made[part] = call
    raise AssertionError("a graph ends with its output")
