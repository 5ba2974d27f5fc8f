"""What an activation's backward reads, as the step of the derivative that each element is on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from packlight.lossy import few_bit
from packlight.lossy.few_bit import Table, above, between, code_bytes, optimal_table
from packlight.moves.lossy.rewrite import Writers
from packlight.moves.lossy.saved import Read, SavedValue

_aten = torch.ops.aten
_ops = torch.ops.packlight
_OPERATORS = (few_bit.derivative_codes, few_bit.times_derivative)  # importing registers them


def _gelu(args: Any, bits: int, kwargs: Any) -> Table:
    kind = kwargs.get("approximate", args[2] if len(args) > 2 else "none")
    return optimal_table("gelu_tanh" if kind == "tanh" else "gelu", bits)


def _elu(args: Any, bits: int, kwargs: Any) -> Table | None:
    alpha, scale, inner, is_result = args[1:5]
    if is_result:
        return None
    selu = optimal_table("selu", bits)
    if math.isclose(alpha, 1.6732632423543772) and inner == 1:
        return selu.scaled(outer=scale / 1.0507009873554805)
    if math.isclose(alpha * inner, 1.0):  # CELU's derivative has no jump
        return optimal_table("elu", bits).scaled(inner, scale / inner)
    return None


def _softplus(args: Any, bits: int, kwargs: Any) -> Table:
    beta = args[2]  # (beyond its threshold the derivative is 1 up to rounding)
    return optimal_table("softplus", bits).scaled(beta, 1 / beta)


# The backward of an activation -> the table of its derivative, None where there is none.
_TABLES: dict[Any, Callable[[Any, int, Any], Table | None]] = {
    _aten.gelu_backward.default: _gelu,
    _aten.elu_backward.default: _elu,
    _aten.softplus_backward.default: _softplus,
    _aten.silu_backward.default: lambda args, bits, _: optimal_table("silu", bits),
    _aten.mish_backward.default: lambda args, bits, _: optimal_table("mish", bits),
    _aten.hardswish_backward.default: lambda args, bits, _: optimal_table("hardswish", bits),
    _aten.tanh_backward.default: (
        lambda args, bits, _: optimal_table("tanh", bits).of_results("tanh")
    ),
    _aten.sigmoid_backward.default: (
        lambda args, bits, _: optimal_table("sigmoid", bits).of_results("sigmoid")
    ),
    _aten.threshold_backward.default: lambda args, bits, _: above(args[2], 1.0),
    _aten.leaky_relu_backward.default: lambda args, bits, _: above(0.0, 1.0, args[2]),
    _aten.hardtanh_backward.default: (
        lambda args, bits, _: between(args[2], args[3], inside=1.0, outside=0.0)
    ),
    _aten.hardsigmoid_backward.default: (
        lambda args, bits, _: between(-3.0, 3.0, inside=1 / 6, outside=0.0)
    ),
}


@dataclass(frozen=True)
class FewBit:
    """An activation's backward multiplies by a step function.

    Attributes:
        bits: 1 to 4; what one bit is exact for takes one bit.
    """

    technique: ClassVar[str] = "few-bit"

    bits: int

    @property
    def name(self) -> str:
        """Of the setting."""
        return f"few-bit-{self.bits}"

    def suits(self, value: SavedValue) -> bool:
        """Whether one backward of an activation is all that reads a value, and has a table.

        What is exact in one bit has no setting with more.
        """
        if len(value.reads) != 1:
            return False
        table = _table(value.reads[0].reader, self.bits)
        return table is not None and table.num_bits == self.bits

    def kept_bytes(self, value: SavedValue) -> int:
        """Return what is kept of a value."""
        return code_bytes(value.fake.numel(), self.bits)

    def keep(self, value: SavedValue, writers: Writers, seed: int) -> _Codes:
        """Write the codes."""
        return _Codes(value, writers, self.bits)


class _Codes:
    def __init__(self, value: SavedValue, writers: Writers, bits: int) -> None:
        (read,) = value.reads
        table = _table(read.reader, bits)
        assert table is not None
        self._writers, self._table = writers, table
        argument = writers.viewed(read, writers.copies[value.node], writers.early)
        self._stride = list(read.reader.meta["val"].stride())
        self._codes = writers.early.call(
            value.node, _ops.derivative_codes.default,
            (argument, list(table.edges), list(table.codes), table.num_bits, self._stride),
        )

    def argument(self, read: Read) -> fx.Node:
        """Never asked for: there is a result."""
        raise AssertionError

    def result(self, read: Read, gradient: fx.Node) -> fx.Node | None:
        """Write the gradient times its derivative."""
        return self._writers.late.call(
            read.reader, _ops.times_derivative.default,
            (gradient, self._codes, list(self._table.levels), self._table.num_bits, self._stride),
        )


def _table(reader: fx.Node, bits: int) -> Table | None:
    find = _TABLES.get(reader.target)
    return None if find is None else find(reader.args, bits, reader.kwargs)
