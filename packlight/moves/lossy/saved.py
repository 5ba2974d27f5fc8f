"""Values that a joint graph's forward makes and its backward reads: what can be approximated.

What is approximated is a storage with all its views: q, k and v that are parts of one buffer are
one value. Only values of which every reader in the backward is known to make something of an
inexact one are found: products are linear in it, so that what is right on average gives gradients
that are; backwards of norms, activations and attention are smooth.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.marks import LATE_KEY
from packlight.capture.phases import forward_calls
from packlight.lossy.arrays import DTYPES, is_dense

# Smaller ones are not worth two calls.
MIN_ELEMENTS = 4096
# Operator -> the arguments that may be inexact.
_READERS: dict[str, tuple[int, ...]] = {
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.mul.Tensor": (0, 1),
    "aten.convolution_backward.default": (1,),
    "aten.native_layer_norm_backward.default": (1,),
    "aten.native_group_norm_backward.default": (1,),
    "aten.native_batch_norm_backward.default": (1,),
    "aten._fused_rms_norm_backward.default": (1,),
    "aten._softmax_backward_data.default": (1,),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (1, 2, 3, 4),
    "aten._scaled_dot_product_flash_attention_backward.default": (1, 2, 3, 4),
    "aten._scaled_dot_product_efficient_attention_backward.default": (1, 2, 3, 5),
    "aten.gelu_backward.default": (1,),
    "aten.silu_backward.default": (1,),
    "aten.mish_backward.default": (1,),
    "aten.softplus_backward.default": (1,),
    "aten.elu_backward.default": (5,),
    "aten.tanh_backward.default": (1,),
    "aten.sigmoid_backward.default": (1,),
    "aten.hardswish_backward.default": (1,),
    "aten.hardsigmoid_backward.default": (1,),
    "aten.leaky_relu_backward.default": (1,),
    "aten.hardtanh_backward.default": (1,),
    "aten.threshold_backward.default": (1,),  # it gets exact bits
}
_POWER, _CAST = "aten.pow.Tensor_Scalar", "aten._to_copy.default"
# Returns what it is given in another shape.
_SAME_STORAGE = ("aten._unsafe_view.default",)


@dataclass(frozen=True)
class Read:
    """One read of a value in the backward.

    Attributes:
        reader: the call.
        place: of the argument.
        views: calls from the value to the argument, in order; most often of the forward.
    """

    reader: fx.Node
    place: int
    views: tuple[fx.Node, ...]


@dataclass(frozen=True)
class SavedValue:
    """A value of the forward that the backward reads.

    Attributes:
        node: made its storage.
        reads: all in the backward.
    """

    node: fx.Node
    reads: tuple[Read, ...]

    @property
    def fake(self) -> torch.Tensor:
        """A fake tensor like it."""
        value: torch.Tensor = self.node.meta["val"]
        return value

    @property
    def num_bytes(self) -> int:
        """How much it takes whole."""
        return self.fake.numel() * self.fake.itemsize

    @cached_property
    def readers(self) -> frozenset[fx.Node]:
        """The calls that read it."""
        return frozenset(read.reader for read in self.reads)

    @property
    def role(self) -> str:
        """What it is to the step: equal for values of equal layers."""
        made = self.node
        if made.target is operator.getitem:
            made = made.all_input_nodes[0]
        readers = sorted({str(reader.target) for reader in self.readers})
        return f"{made.target} {tuple(self.fake.shape)} {self.fake.dtype} -> {', '.join(readers)}"


def saved_values(module: fx.GraphModule) -> list[SavedValue]:
    """Return a joint graph's values that can be approximated, in the order of the forward.

    Values that are parameters in another dtype or shape are none: those are there anyway, or cheap
    to make again. Neither is what the step returns.
    """
    nodes = list(module.graph.nodes)
    forward = forward_calls(nodes)
    found: dict[fx.Node, list[Read]] = {}
    refused: set[fx.Node] = set()
    for node in nodes:
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args)
            refused.update(_origin(leaf)[0] for leaf in leaves if isinstance(leaf, fx.Node))
            continue
        if node.op != "call_function" or node in forward or _is_view(node):
            continue
        for source in node.all_input_nodes:
            value, views = _origin(source)
            if value not in forward or value.meta.get(LATE_KEY):
                continue
            places = [place for place, argument in enumerate(node.args) if argument is source]
            if node.meta.get(LATE_KEY) or not places or not _takes_inexact(node, places):
                refused.add(value)
            found.setdefault(value, []).extend(Read(node, place, views) for place in places)
    return [
        SavedValue(node, tuple(found[node])) for node in nodes
        if node in found and node not in refused and _can_be_packed(node)
    ]


def _takes_inexact(reader: fx.Node, places: list[int]) -> bool:
    if str(reader.target) == _POWER:
        return places == [0] and float(reader.args[1]) >= 1  # type: ignore[arg-type]
    return set(places) <= set(_READERS.get(str(reader.target), ()))


def _can_be_packed(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor) and value.dtype in DTYPES
        and value.numel() >= MIN_ELEMENTS and is_dense(value) and not _is_given(node)
    )


def _is_given(node: fx.Node) -> bool:
    """Whether a value is an input of the step in another dtype or shape."""
    while str(node.target) == _CAST or _is_view(node):
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def _origin(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the node whose storage a node looks at, and the views on the way from there."""
    views: list[fx.Node] = []
    while _is_view(node):
        views.append(node)
        node = node.all_input_nodes[0]
    return node, tuple(reversed(views))


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view or str(node.target) in _SAME_STORAGE
