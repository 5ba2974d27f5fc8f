"""Writes calls into an FX graph together with what they return (fake tensors) and come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from packlight.capture.fakes import fake_result
from packlight.torch_internals.dispatch import FakeTensorMode

_aten = torch.ops.aten


class GraphWriter:
    """Adds calls at the end of a graph.

    Args:
        graph: written to.
        fake_mode: the mode that the graph's other values belong to.
        marks: meta entries of every node written.
    """

    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode, marks: dict[str, Any]) -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.marks = marks
        self._written: list[fx.Node] = []

    def view(self, origin: fx.Node, source: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Return a tensor in another shape: a view, where strides do not allow it a copy."""
        try:
            return self.call(origin, _aten.view.default, (source, list(shape)))
        except (RuntimeError, ValueError):
            copy = self.call(
                origin, _aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )
            return self.call(origin, _aten.view.default, (copy, list(shape)))

    def call(
        self,
        origin: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Any = None,
        name: str | None = None,
    ) -> fx.Node:
        """Add a call that stands for (a part of) a node, with what it would return."""
        kwargs = kwargs or {}
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        value = fake_result(self.fake_mode, target, fake_args, fake_kwargs)
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = {k: v for k, v in origin.meta.items() if k not in ("val", "tensor_meta")}
        node.meta["val"] = value
        node.meta.update(self.marks)
        self._written.append(node)
        return node

    def with_strides(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """Return a value in the layout of the one that it replaces: views of it rely on that."""
        wanted = node.meta["val"].stride()
        if made.meta["val"].stride() == wanted:
            return made
        order = sorted(range(len(wanted)), key=lambda d: -wanted[d])
        made = self.call(node, _aten.permute.default, (made, order))
        made = self.call(
            node, _aten.clone.default, (made,), {"memory_format": torch.contiguous_format}
        )
        back = [order.index(d) for d in range(len(wanted))]
        return self.call(node, _aten.permute.default, (made, back))

    def erase_unused(self) -> None:
        """Take out written calls that nothing reads."""
        for node in reversed(self._written):
            if not node.users:
                self.graph.erase_node(node)
