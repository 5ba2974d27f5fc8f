"""A joint graph in which groups of calls are one call each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.joint import JointStep
from packlight.capture.marks import LATE_KEY
from packlight.capture.order import in_order
from packlight.kernels.kernel import Kernel, Region
from packlight.moves.fuse.fusable import dropout_backward
from packlight.moves.fuse.loss import log_softmax_backward, loss_of
from packlight.moves.fuse.partition import Group
from packlight.step import Phase
from packlight.torch_internals.aot import is_traced_in_backward
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten


class GroupGraph:
    """A group of a step's calls as a graph of its own.

    Args:
        step: as it was read.
        group: of its operations.
        rounds_as_eager: every call's result is to be rounded to its dtype.

    Attributes:
        region: what a kernel has to compute.
        name: of that kernel.
        arguments: nodes of the step's graph that are its inputs, in order.
        results: for each of its outputs, in order, the nodes that stand for it.
    """

    def __init__(self, step: JointStep, group: Group, *, rounds_as_eager: bool) -> None:
        self.step, self.group = step, group
        self.members = [step.node_of_operation[o] for o in group.operations]
        self.arguments: list[fx.Node] = []
        self._inside = set(self.members)
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        for node in self.members:
            self._values[node] = self._call(node)
        roots = [step.root_of_buffer[b] for b in group.outputs]
        self.results = [_same_items(root) for root in roots if root is not None]
        self._graph.output(tuple([self._value(same[0]) for same in self.results]))
        self.region = Region(
            GraphData(torch.nn.Module(), self._graph),
            tuple([node.meta["val"] for node in self.arguments]),
            tuple([same[0].meta["val"] for same in self.results]),
            rounds_as_eager,
        )
        self.name = self.region.name

    def _call(self, node: fx.Node) -> fx.Node:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value)
        call, target = self._graph.call_function, cast(Callable[..., Any], node.target)
        if node.target is dropout_backward():
            gradient, mask, p = args
            dtype = node.meta["val"].dtype
            noise = torch.ones((), dtype=dtype).div_(1 - p).item() if p < 1 else 0.0
            kept = call(_aten._to_copy.default, (mask,), {"dtype": dtype})
            return call(_aten.mul.Tensor, (call(_aten.mul.Tensor, (kept, gradient)), noise))
        loss = loss_of(node)
        if loss in self._inside and loss is not None:
            return log_softmax_backward(self._graph, node, loss, self._value)
        return call(target, args, kwargs)

    def _value(self, node: fx.Node) -> fx.Node:
        """Return a value: made inside, a view that is made again inside, or an argument."""
        is_item = node.target is operator.getitem and node.args[0] in self._inside
        if is_item:
            node = min(_same_items(node))
        if node not in self._values:
            if is_item or is_view(self.step, node):
                self._values[node] = self._call(node)
            else:
                self.arguments.append(node)
                self._values[node] = self._placeholder(f"a{len(self.arguments)}")
        value: fx.Node = self._values[node]
        return value

    def _placeholder(self, name: str) -> fx.Node:
        first_call = next((n for n in self._graph.nodes if n.op != "placeholder"), None)
        if first_call is None:
            return self._graph.placeholder(name)
        with self._graph.inserting_before(first_call):
            return self._graph.placeholder(name)


def is_view(step: JointStep, node: fx.Node) -> bool:
    """Whether a node looks at a storage, and is no result of a call that makes several."""
    if node not in step.folded:
        return False
    parent = node.args[0]
    is_item = node.target is operator.getitem and isinstance(parent, fx.Node)
    return not is_item or parent in step.folded


def _same_items(root: fx.Node) -> list[fx.Node]:
    """Return the nodes that take the same item of a call's results as one of them does."""
    if root.target is not operator.getitem:
        return [root]
    parent, index = root.args
    assert isinstance(parent, fx.Node)
    same = [u for u in parent.users if u.target is operator.getitem and u.args[1] == index]
    return [root, *(node for node in same if node is not root)]


def fused(step: JointStep, kernels: Mapping[GroupGraph, Kernel]) -> fx.GraphModule:
    """Return a copy of a joint graph in which groups of calls are calls of kernels.

    Args:
        step: the graph, as it was read; stays as it is.
        kernels: groups of its calls, and what computes them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    module = step.module
    for item in _in_order(list(module.graph.nodes), list(kernels)):
        if isinstance(item, fx.Node):
            if item.op == "output" or all(i in copies for i in item.all_input_nodes):
                copies[item] = graph.node_copy(item, copies.__getitem__)
            continue  # else a view of what only a kernel sees
        kernel = kernels[item]
        call = graph.call_function(
            kernel.overload, tuple([copies[node] for node in item.arguments])
        )
        call.meta = _meta(item)
        if len(item.results) == 1:
            call.meta["val"] = item.region.outputs[0]
            copies.update(dict.fromkeys(item.results[0], call))
            continue
        call.meta["val"] = item.region.outputs
        for index, same in enumerate(item.results):
            part = graph.call_function(operator.getitem, (call, index))
            part.meta = {**same[0].meta}
            copies.update(dict.fromkeys(same, part))
    copy_calling_convention(module.graph, graph)
    graph.lint()
    rewritten = GraphData(module, graph)
    rewritten.meta.update(module.meta)
    return rewritten


def _meta(item: GroupGraph) -> dict[str, Any]:
    """Return the metadata of the call that takes longest, of those traced where the group runs."""
    step, operations = item.step, item.group.operations
    is_forward = step.graph.operations[operations[0]].phase is Phase.FORWARD
    longest = max(
        operations,
        key=lambda o: (
            is_traced_in_backward(step.node_of_operation[o]) is not is_forward,
            step.graph.operations[o].seconds,
        ),
    )
    meta = {**step.node_of_operation[longest].meta}
    meta.pop(LATE_KEY, None)
    if not is_forward and not is_traced_in_backward(step.node_of_operation[longest]):
        meta[LATE_KEY] = True
    return meta


def _in_order(
    nodes: Sequence[fx.Node], groups: Iterable[GroupGraph]
) -> list[fx.Node | GroupGraph]:
    """Return groups and the nodes outside of them, each as near to its old place as it can be.

    A group's place is that of its last call.
    """
    position = {node: index for index, node in enumerate(nodes)}
    item_of: dict[fx.Node, fx.Node | GroupGraph] = {node: node for node in nodes}
    place: dict[fx.Node | GroupGraph, int] = {node: index for node, index in position.items()}
    for group in groups:
        place[group] = max(position[node] for node in group.members)
        item_of.update(dict.fromkeys(group.members, group))
        item_of.update(dict.fromkeys((node for same in group.results for node in same), group))
    inputs: dict[fx.Node | GroupGraph, set[fx.Node | GroupGraph]] = {}
    for node in nodes:
        item = item_of[node]
        needed = node.all_input_nodes if isinstance(item, fx.Node) else item.arguments
        inputs.setdefault(item, {item_of[i] for i in needed})
    return in_order(inputs, place)
