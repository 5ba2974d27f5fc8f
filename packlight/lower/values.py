"""What a section that is being written has in memory: the latest value of every joint node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.lower.facts import Facts
from packlight.lower.program import OPERATION_KEY


class Values:
    """Values of joint nodes, as nodes of the graph that is being written.

    Args:
        facts: about the schedule.
        graph: views and items are made again there where they are needed.
    """

    def __init__(self, facts: Facts, graph: fx.Graph) -> None:
        self.facts, self.step, self.graph = facts, facts.step.joint, graph
        self._of_node: dict[fx.Node, fx.Node] = {}
        self._nodes_of: dict[int, list[fx.Node]] = {}
        # Of buffers that no joint node stands for: generator states, snapshots, kept results.
        self._alone: dict[int, fx.Node] = {}

    def place(self, node: fx.Node, value: fx.Node) -> None:
        """Note the value of a joint node."""
        self._of_node[node] = value
        buffer = self.step.buffer_of_node.get(node)
        if buffer is not None:
            self._nodes_of.setdefault(buffer, []).append(node)

    def place_alone(self, buffer: int, value: fx.Node) -> None:
        """Note the value of a buffer that no joint node stands for."""
        self._alone[buffer] = value

    def place_whole(self, buffer: int, value: fx.Node) -> None:
        """Note the value that owns a buffer's storage."""
        root = self.step.root_of_buffer[buffer]
        if buffer in self.facts.states or root is None:
            self.place_alone(buffer, value)
        else:
            self.place(root, value)

    def forget(self, buffer: int) -> None:
        """Note that a buffer is not in memory any more."""
        for node in self._nodes_of.pop(buffer, ()):
            self._of_node.pop(node, None)
        self._alone.pop(buffer, None)

    def forget_node(self, node: fx.Node) -> None:
        """Note that a node without a buffer, a tuple, is not needed any more."""
        self._of_node.pop(node, None)

    def whole(self, buffer: int) -> fx.Node:
        """Return the value that owns a buffer's storage."""
        if buffer in self._alone:
            return self._alone[buffer]
        root = self.step.root_of_buffer[buffer]
        is_missing = root is None or buffer in self.facts.states
        assert not is_missing, f"buffer {buffer} is not in memory"
        value: fx.Node = self.of(root)
        return value

    def of(self, node: Any) -> Any:
        """Return the value of a joint node, making views and items again where needed."""
        if not isinstance(node, fx.Node):
            return node
        if node in self._of_node:
            return self._of_node[node]
        constant = node.meta.get("val")
        if isinstance(constant, (int, float, bool)):
            return constant
        if isinstance(constant, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return (
                constant.node.int_() if isinstance(constant, torch.SymInt) else constant.node.expr
            )
        assert node in self.step.folded, f"{node} is not in memory"
        args, kwargs = self.arguments(node)
        target: Any = node.target
        new = self.graph.call_function(target, args, kwargs)
        new.meta = plain_meta(node.meta)
        self.place(node, new)
        return new

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of a joint node's call."""
        args, kwargs = pytree.tree_map_only(fx.Node, self.of, (node.args, dict(node.kwargs)))
        return args, kwargs


def plain_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """Return a joint node's metadata for a node that takes its place."""
    left_out = ("saved_tensor_with_no_vc_check", OPERATION_KEY)
    return {k: v for k, v in meta.items() if k not in left_out}
