"""Values kept in few bits, unpacked right before each use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from packlight.lossy.packing import pack_values, packed_bytes, unpack_values
from packlight.moves.lossy.rewrite import Writers
from packlight.moves.lossy.saved import Read, SavedValue
from packlight.moves.pack import pack_bits, unpack_bits

_aten = torch.ops.aten
_ops = torch.ops.packlight
_OPERATORS = (pack_values, unpack_values, pack_bits, unpack_bits)  # importing registers them


@dataclass(frozen=True)
class PackedTo:
    """A value is kept in 8, 4 or 2 bits an element.

    A rectifier's backward asks only whether a value is above a threshold: it gets that as exact
    bits, since a value that is rounded down to the threshold would lose its gradient.

    Attributes:
        bits: of each element.
    """

    technique: ClassVar[str] = "packed"

    bits: int

    @property
    def name(self) -> str:
        """Of the setting."""
        return f"packed-{self.bits}"

    def suits(self, value: SavedValue) -> bool:
        """Whether a value can be packed: all can."""
        return True

    def kept_bytes(self, value: SavedValue) -> int:
        """Return what is kept of a value."""
        num_elements = value.fake.numel()
        is_compared = any(map(_is_threshold, value.readers))
        is_wide = not all(map(_is_threshold, value.readers))
        return (
            is_wide * packed_bytes(num_elements, self.bits) + is_compared * -(-num_elements // 8)
        )

    def keep(self, value: SavedValue, writers: Writers, seed: int) -> _Packed:
        """Write the packing."""
        return _Packed(value, writers, self.bits, seed)


class _Packed:
    def __init__(self, value: SavedValue, writers: Writers, bits: int, seed: int) -> None:
        self._value, self._writers, self._bits = value, writers, bits
        node = value.node
        self._copy = writers.copies[node]
        self._masks: dict[float, fx.Node] = {}
        self._packed: fx.Node | None = None
        if not all(map(_is_threshold, value.readers)):
            arguments = (self._copy, bits, seed, list(value.fake.stride()))
            self._packed = writers.early.call(node, _ops.pack_values.default, arguments)
        for reader in filter(_is_threshold, value.readers):
            threshold = reader.args[2]
            assert isinstance(threshold, (int, float))
            if threshold not in self._masks:
                mask = writers.early.call(node, _aten.le.Scalar, (self._copy, threshold))
                self._masks[threshold] = writers.early.call(
                    node, _ops.pack_bits.default, (mask,)
                )

    def argument(self, read: Read) -> fx.Node:
        """Write an unpacking for one reader."""
        fake = self._value.fake
        wide = self._writers.late.call(
            self._value.node, _ops.unpack_values.default,
            (self._packed, self._bits, list(fake.shape), list(fake.stride()), fake.dtype),
        )
        return self._writers.viewed(read, wide)

    def result(self, read: Read, gradient: fx.Node) -> fx.Node | None:
        """Write a rectifier's backward from its bits."""
        if not _is_threshold(read.reader):
            return None
        late, fake = self._writers.late, self._value.fake
        threshold = read.reader.args[2]
        assert isinstance(threshold, (int, float))
        mask = late.call(
            self._value.node, _ops.unpack_bits.default,
            (self._masks[threshold], list(fake.shape), list(fake.stride())),
        )
        mask = self._writers.viewed(read, mask)
        made = late.call(read.reader, _aten.masked_fill.Scalar, (gradient, mask, 0))
        return late.with_strides(read.reader, made)


def _is_threshold(reader: fx.Node) -> bool:
    return reader.target is _aten.threshold_backward.default
