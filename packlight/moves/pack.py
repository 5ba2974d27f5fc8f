"""Masks kept as bits and pooling indices as small integers: the same numbers in fewer bytes.

What a dropout keeps for its backward is one byte per element, and a ReLU whose result nobody else
needs keeps four; a bit says all of it. A pooling layer keeps the places of its maxima in 64-bit
integers, which never count beyond the input's plane. The graph is rewritten so that the
backward reads the narrow form, made wide again where it is read. All of it is exact.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.phases import after_tangents
from packlight.capture.writer import GraphWriter
from packlight.moves.draft import Draft
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.torch_internals.aot import TRACED_IN_BACKWARD
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten
# Smaller ones are not worth two calls.
MIN_ELEMENTS = 4096
_BITS = 8
# Operator -> how many trailing dims of its input indices count through.
_POOLS = {
    _aten.max_pool2d_with_indices.default: 2,
    _aten.max_pool3d_with_indices.default: 3,
    _aten.adaptive_max_pool2d.default: 2,
    _aten.adaptive_max_pool3d.default: 3,
}
_POOL_BACKWARDS = (
    _aten.max_pool2d_with_indices_backward.default,
    _aten.adaptive_max_pool2d_backward.default,
)


@dataclass(frozen=True)
class Pack(Move):
    """Masks are kept as bits, pooling indices as small integers."""

    name: ClassVar[str] = "pack"
    effect: ClassVar[Effect] = Effect.SAME_BITS

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Pack | Refusal]:
        """Yield the one setting where there is something to pack."""
        if _packed(draft) is draft.module:
            yield Refusal("the backward reads no masks and no pooling indices")
        else:
            yield Pack()

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten."""
        return draft.changed(module=_packed(draft))

    def describe(self, draft: Draft) -> str:
        """Return what is packed."""
        return "masks and indices packed"


def _packed(draft: Draft) -> fx.GraphModule:
    return draft.once("packed", lambda: with_packed_buffers(draft.graph_module))


@torch.library.custom_op("packlight::pack_bits", mutates_args=())
def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask as bits.

    Bit i of byte j is element i * n + j, in the order in which elements lie in memory, where n is
    the number of bytes: so every pass reads and writes memory in order.

    Args:
        mask: bool, of any shape, without gaps in memory.

    Returns:
        uint8, one-dimensional.
    """
    elements = _in_memory_order(mask).view(torch.uint8)
    num_bytes = -(-len(elements) // _BITS)
    packed = elements.new_zeros(num_bytes)
    for bit in range(_BITS):
        part = elements[bit * num_bytes : (bit + 1) * num_bytes]
        packed[: len(part)].add_(part, alpha=1 << bit)
    return packed


@pack_bits.register_fake
def _(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(-(-mask.numel() // _BITS), dtype=torch.uint8)


@torch.library.custom_op("packlight::unpack_bits", mutates_args=())
def unpack_bits(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Return the mask of that size and stride behind bits made by `pack_bits`."""
    mask = torch.empty_strided(size, stride, dtype=torch.bool, device=packed.device)
    elements = _in_memory_order(mask).view(torch.uint8)
    for bit in range(_BITS):
        part = elements[bit * len(packed) : (bit + 1) * len(packed)]
        torch.bitwise_right_shift(packed[: len(part)], bit, out=part)
        part.bitwise_and_(1)
    return mask


@unpack_bits.register_fake
def _(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=torch.bool, device=packed.device)


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def with_packed_buffers(module: fx.GraphModule) -> fx.GraphModule:
    """Return a joint graph whose backward reads packed masks and indices; the module if none.

    Args:
        module: a joint graph from AOTAutograd; stays as it is.
    """
    packer = _Packer(module)
    return packer.rewritten() if packer.finds_something() else module


class _Packer:
    """One joint graph's values that the forward makes and the backward reads."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        nodes = list(module.graph.nodes)
        self.backward = after_tangents(nodes)
        # Backward operations that read each value of the forward, under whichever name.
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            if node in self.backward and node.op != "output":
                for source in {_original(i) for i in node.all_input_nodes}:
                    if source.op == "call_function" and source not in self.backward:
                        self.readers.setdefault(source, []).append(node)
        worth_it = [
            n for n in self.readers
            if isinstance(v := n.meta.get("val"), torch.Tensor) and v.numel() >= MIN_ELEMENTS
        ]
        self.masks = {n for n in worth_it if n.meta["val"].dtype == torch.bool and _is_dense(n)}
        self.indices = {n: d for n in worth_it if (d := _index_dtype(n)) is not None}
        self.thresholds = {
            n: t for n in worth_it if _is_dense(n) and (t := self._threshold(n)) is not None
        }

    def finds_something(self) -> bool:
        """Whether there is anything to pack."""
        return bool(self.masks or self.indices or self.thresholds)

    def _threshold(self, value: fx.Node) -> float | None:
        """Return the number that the backward compares a value with, if that is all it does."""
        thresholds: set[Any] = set()
        for reader in self.readers[value]:
            if reader.target is _aten.threshold_backward.default:
                gradient, compared, threshold = reader.args
                assert isinstance(gradient, fx.Node) and isinstance(compared, fx.Node)
                like, result = gradient.meta["val"], reader.meta["val"]
                if _original(gradient) is value or like.stride() != result.stride():
                    return None
                thresholds.add(threshold)
            elif not _reads_only_shape(reader, value):
                return None
        return thresholds.pop() if len(thresholds) == 1 else None

    def rewritten(self) -> fx.GraphModule:
        """Return the module's copy in which the backward reads what is packed."""
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        fake_mode = fake_mode_of(self.module)
        self.early = GraphWriter(self.graph, fake_mode, {})
        self.late = GraphWriter(self.graph, fake_mode, TRACED_IN_BACKWARD)
        widen: dict[fx.Node, Callable[[], fx.Node]] = {}
        for node in self.module.graph.nodes:
            if node in self.backward and node.op == "call_function":
                self.copies[node] = self._copied_reader(node, widen)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
                if node in self.thresholds:
                    arguments = (self.copies[node], self.thresholds[node])
                    widen[node] = self._packed(self.early.call(node, _aten.le.Scalar, arguments))
                elif node in self.masks:
                    widen[node] = self._packed(self.copies[node])
                elif node in self.indices:
                    widen[node] = self._narrowed(node, self.indices[node])
        copy_calling_convention(self.module.graph, self.graph)
        self.graph.lint()
        module = GraphData(self.module, self.graph)
        module.meta.update(self.module.meta)
        return module

    def _packed(self, mask: fx.Node) -> Callable[[], fx.Node]:
        bits = self.early.call(mask, torch.ops.packlight.pack_bits.default, (mask,))
        shape, strides = list(mask.meta["val"].shape), list(mask.meta["val"].stride())
        arguments = (bits, shape, strides)
        return lambda: self.late.call(mask, torch.ops.packlight.unpack_bits.default, arguments)

    def _narrowed(self, indices: fx.Node, dtype: torch.dtype) -> Callable[[], fx.Node]:
        to_copy, wide_dtype = _aten._to_copy.default, indices.meta["val"].dtype
        narrow = self.early.call(indices, to_copy, (self.copies[indices],), {"dtype": dtype})
        return lambda: self.late.call(indices, to_copy, (narrow,), {"dtype": wide_dtype})

    def _copied_reader(
        self, reader: fx.Node, widen: dict[fx.Node, Callable[[], fx.Node]]
    ) -> fx.Node:
        """Return a backward operation that reads packed values, made wide for it alone."""
        wide: dict[fx.Node, fx.Node] = {}
        for source in reader.all_input_nodes:
            value = _original(source)
            if value in widen and value in self.thresholds and _reads_only_shape(reader, value):
                wide[source] = self._shape_alone(source)
            elif value in widen:
                wide[source] = widen[value]()
        if reader.target is _aten.threshold_backward.default and wide:
            gradient, compared = reader.all_input_nodes
            arguments = (self.copies[gradient], wide[compared], 0)
            return self.late.call(reader, _aten.masked_fill.Scalar, arguments)
        return self.graph.node_copy(reader, lambda n: wide.get(n) or self.copies[n])

    def _shape_alone(self, source: fx.Node) -> fx.Node:
        """Return a tensor of a value's shape that holds one number."""
        value = source.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        one = self.late.call(source, _aten.zeros.default, ([1] * value.dim(),), options)
        return self.late.call(source, _aten.expand.default, (one, list(value.shape)))


def _original(node: fx.Node) -> fx.Node:
    while node.target is _aten.detach.default:
        node = node.all_input_nodes[0]
    return node


def _reads_only_shape(reader: fx.Node, value: fx.Node) -> bool:
    """Whether a kernel ignores the elements of a value that it is given.

    A pooling layer's backward on the CPU goes by the indices. (On CUDA it asks for its input to be
    contiguous, which would make a copy of what stands for it.)
    """
    is_pool = reader.target in _POOL_BACKWARDS
    tensor = value.meta["val"]
    return (
        is_pool and tensor.device.type == "cpu" and tensor.is_contiguous()
        and sum(_original(i) is value for i in reader.all_input_nodes) == 1
        and _original(reader.args[1]) is value  # type: ignore[arg-type]
    )


def _index_dtype(node: fx.Node) -> torch.dtype | None:
    """Return the smallest type of integers that holds what a pooling layer's indices can be."""
    pool = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    if not isinstance(pool, fx.Node) or pool.target not in _POOLS:
        return None
    pooled = pool.args[0]
    assert isinstance(pooled, fx.Node)
    plane = math.prod(pooled.meta["val"].shape[-_POOLS[pool.target] :])
    fitting = (t for t in (torch.int16, torch.int32) if plane - 1 <= torch.iinfo(t).max)
    return next(fitting, None)


def _is_dense(node: fx.Node) -> bool:
    """Whether a value fills its storage, so that its elements can be read in memory's order."""
    value: torch.Tensor = node.meta["val"]
    return value.untyped_storage().nbytes() == value.numel() * value.itemsize
