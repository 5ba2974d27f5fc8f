"""One trace for many sizes: a joint graph with symbolic sizes, made into one with numbers.

Where only sizes of a batch's tensors change (a sequence's length, the rows of the last batch), the
loss is traced once more with symbols in their place, under guards that say for which numbers the
graph holds. For any such numbers the graph has the calls of a trace of its own: sizes that it
computes are computed here, and shapes of its values follow from their expressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.aot import GraphData
from packlight.capture.batch import batch_leaves
from packlight.capture.fakes import fake_tensor
from packlight.costs.measure import real_tensors
from packlight.torch_internals.aot import is_tangent
from packlight.torch_internals.dispatch import FakeTensorMode, is_fake
from packlight.torch_internals.dynamo import marked_dynamic, with_numbers
from packlight.torch_internals.storages import storage_identity

# Where in a batch there are tensors whose sizes change: path -> dimensions.
Changing = Mapping[str, frozenset[int]]

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class NoNumbersError(Exception):
    """A symbolic graph with something in it that has no form with numbers here."""


@contextmanager
def sizes_as_symbols(batch: Any, changing: Changing) -> Iterator[None]:
    """Have dynamo trace with symbols in the place of the sizes that change."""
    leaves = dict(batch_leaves(batch))
    found = [(leaves[path], dims) for path, dims in changing.items() if path in leaves]
    with marked_dynamic((t, dims) for t, dims in found if isinstance(t, torch.Tensor)):
        yield


def is_symbolic(joint: fx.GraphModule) -> bool:
    """Whether a joint graph has symbols in it."""
    return any(isinstance(n.meta.get("val"), SYMBOLS) for n in joint.graph.nodes)


def with_sizes(
    joint: fx.GraphModule, num_forward_outputs: int, sizes: Sequence[int]
) -> fx.GraphModule:
    """Return the joint graph for some sizes, equal to that of a trace with them.

    Args:
        joint: with symbols among its primals; not changed.
        num_forward_outputs: how many of its results belong to the forward.
        sizes: what the primals that are symbols stand for, in their order.

    Raises:
        NoNumbersError: there is something in it that is not known here.
    """
    with real_tensors():
        return _Numbers(joint, num_forward_outputs, sizes).module()


class _Numbers:
    def __init__(
        self, joint: fx.GraphModule, num_forward_outputs: int, sizes: Sequence[int]
    ) -> None:
        self.joint, self.num_forward_outputs = joint, num_forward_outputs
        self.mode = FakeTensorMode()
        placeholders = enumerate(joint.graph.find_nodes(op="placeholder"))
        self.symbols = {
            place: node.meta["val"]
            for place, node in placeholders
            if isinstance(node.meta.get("val"), torch.SymInt)
        }
        self.number = with_numbers(zip(self.symbols.values(), sizes, strict=True))
        self.storages: dict[int, torch.UntypedStorage] = {}
        # What stands for a node: its copy, or the number that it computes.
        self.values: dict[fx.Node, Any] = {}

    def module(self) -> fx.GraphModule:
        graph, num_primals = fx.Graph(), 0
        for node in self.joint.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and (isinstance(value, SYMBOLS) or _asserts(node)):
                self.values[node] = node.target(*self._real(node.args), **self._real(node.kwargs))
                continue
            if node.op == "placeholder" and isinstance(value, SYMBOLS):
                self.values[node] = self.number(value)
                continue
            copy = self.values[node] = graph.node_copy(node, self.values.__getitem__)
            if node.op == "placeholder" and not is_tangent(node):  # numbered without the symbols
                num_primals += 1
                copy.target = copy.name = f"primals_{num_primals}"
            copy.meta = dict(node.meta)
            if "val" in node.meta:
                copy.meta["val"] = pytree.tree_map(self._concrete, value)
        self._without_gradients_of_symbols(copy)
        return GraphData(self.joint, graph)

    def _without_gradients_of_symbols(self, output: fx.Node) -> None:
        dropped = {self.num_forward_outputs + place for place in self.symbols}
        results: Any = output.args[0]
        output.args = ([r for i, r in enumerate(results) if i not in dropped],)
        described = output.meta.get("desc")
        if described is not None:
            output.meta["desc"] = [d for i, d in enumerate(described) if i not in dropped]

    def _real(self, arguments: Any) -> Any:
        """Return arguments of a call that computes sizes."""

        def real(node: fx.Node) -> Any:
            value = self.values[node]
            return value.meta["val"] if isinstance(value, fx.Node) else value

        return fx.map_arg(arguments, real)

    def _concrete(self, value: Any) -> Any:
        if isinstance(value, SYMBOLS):
            return self.number(value)
        if not is_fake(value):
            return value
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise NoNumbersError
        identity = storage_identity(value)
        if identity not in self.storages:
            num_bytes = self.number(value.untyped_storage().nbytes())
            self.storages[identity] = torch.UntypedStorage(num_bytes, device="meta")
        shape, stride = map(self.number, value.shape), map(self.number, value.stride())
        fake = fake_tensor(
            self.mode, self.storages[identity], value.dtype, value.device, tuple(shape),
            tuple(stride), self.number(value.storage_offset()),
        )
        return fake.requires_grad_() if value.requires_grad else fake


def _asserts(node: fx.Node) -> bool:
    """Whether a call says something of sizes alone: it returns nothing and is given no tensor."""
    if node.meta.get("val") is not None or not node.all_input_nodes:
        return False
    return all(isinstance(n.meta.get("val"), SYMBOLS) for n in node.all_input_nodes)
