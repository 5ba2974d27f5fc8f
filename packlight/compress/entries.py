"""What a header says of each tensor, and which of several ways to write one is the shortest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from packlight.compress.alphabet import Alphabet, Codes, alphabet_of, write_values
from packlight.compress.contexts import MAX_LAG, MAX_LAGS, WEIGHINGS, Weighing
from packlight.compress.errors import CompressionError
from packlight.compress.huffman_coding import default_index_bits
from packlight.compress.range_coding import choose_lags, choose_settings

# Larger tensors are written without a search for the best way.
_MAX_SEARCHED_ELEMENTS = 1 << 19

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor's line in the header.

    Attributes:
        name: in the model's `state_dict()`.
        dtype, shape: of the tensor.
        kind: "few" distinct values, "raw" bytes, or "tied" to another tensor.
        tied_to: that tensor's name.
        form: how the values are written; see `alphabet.write_values`.
        num_values: other than zero.
        num_nonzeros: elements that are not zero.
        weighing: how the range coder weighs the past.
        is_transposed: whether rows of the matrix are coded as columns.
        index_bits: of a distance, for Huffman's code.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    tied_to: str = ""
    form: str = ""
    num_values: int = 0
    num_nonzeros: int = 0
    weighing: Weighing = Weighing()
    is_transposed: bool = False
    index_bits: int = 0

    @property
    def num_elements(self) -> int:
        """Of the tensor."""
        return prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return (rows, columns) as they are coded."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        columns = self.num_elements // rows if rows else 0
        return (columns, rows) if self.is_transposed else (rows, columns)

    def to_json(self) -> list[Any]:
        """Return the entry, short."""
        start = [self.name, _NAMES[self.dtype], list(self.shape), self.kind]
        if self.kind == "tied":
            return [*start, self.tied_to]
        if self.kind == "raw":
            return start
        few = [*start[:3], self.form, self.num_values, self.num_nonzeros]
        if self.index_bits:
            return [*few, self.index_bits]
        number = WEIGHINGS.index(replace(self.weighing, lags=()))
        return [*few, 2 * number + self.is_transposed, *self.weighing.lags]

    @classmethod
    def from_json(cls, line: Any, coding: str) -> Entry:
        """Return the entry that `to_json` made.

        Raises:
            ValueError, KeyError, TypeError, IndexError: it is none.
        """
        name, dtype, shape, kind, *rest = line
        entry = cls(str(name), _DTYPES[dtype], tuple(int(size) for size in shape), kind)
        if min(entry.shape, default=0) < 0:
            raise ValueError(f"{name} has the shape {shape}")
        if kind == "tied":
            return replace(entry, tied_to=str(rest[0]))
        if kind == "raw":
            return entry
        num_values, num_nonzeros, setting, *lags = (int(number) for number in rest)
        entry = replace(
            entry, kind="few", form=kind, num_values=num_values, num_nonzeros=num_nonzeros
        )
        if not 0 <= num_nonzeros <= entry.num_elements or num_values < 0:
            raise ValueError(f"{name} has {num_nonzeros} of {entry.num_elements} weights")
        if coding == "huffman":
            if not 0 < setting <= 24:
                raise ValueError(f"{name} has distances of {setting} bits")
            return replace(entry, index_bits=setting)
        is_lag = all(0 < lag <= MAX_LAG for lag in lags) and len(lags) <= MAX_LAGS
        if not is_lag or not 0 <= setting < 2 * len(WEIGHINGS):
            raise ValueError(f"{name} is weighed by {setting} and {lags}")
        weighing = replace(WEIGHINGS[setting // 2], lags=tuple(lags))
        return replace(entry, weighing=weighing, is_transposed=bool(setting % 2))


@dataclass(frozen=True)
class Part:
    """A tensor ready to be written.

    Attributes:
        entry: its line in the header.
        tensor: on the CPU.
        alphabet: None unless the entry's kind is "few".
        table: the alphabet's values as bytes.
    """

    entry: Entry
    tensor: torch.Tensor
    alphabet: Alphabet | None = None
    table: bytes = b""

    def rows(self) -> Codes:
        """Return the codes, int32, as rows in the order in which they are coded."""
        assert self.alphabet is not None
        return rows_of(self.alphabet.codes_of(self.tensor), self.entry)


def rows_of(codes: Codes, entry: Entry) -> Codes:
    """Return flat codes as rows in the order in which they are coded."""
    if entry.is_transposed:
        return np.ascontiguousarray(codes.reshape(entry.matrix_shape[::-1]).T)
    return codes.reshape(entry.matrix_shape)


def parts_of(
    state: Mapping[str, Any], coding: str, index_bits: Mapping[str, int]
) -> list[Part]:
    """Return all tensors of a `state_dict`, ready to be written.

    Raises:
        CompressionError: something in it is no dense tensor, or a parameter is NaN or infinite.
    """
    parts: list[Part] = []
    homes: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CompressionError(
                name, f"is a {type(value).__name__}, not a dense tensor",
                "save what it is made of, or leave it out: save(path, {name: tensor, ...})",
            )  # fmt: skip
        if value.dtype not in _NAMES:
            raise CompressionError(name, f"has the dtype {value.dtype}, which files do not hold")
        home = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and home in homes:
            entry = Entry(name, value.dtype, tuple(value.shape), "tied", tied_to=homes[home])
            parts.append(Part(entry, value))
            continue
        homes[home] = name
        parts.append(_part_of(name, value.detach().cpu(), coding, index_bits.get(name)))
    return parts


def _part_of(name: str, tensor: torch.Tensor, coding: str, index_bits: int | None) -> Part:
    shape = tuple(tensor.shape)
    alphabet = alphabet_of(tensor)
    if alphabet is None:
        return Part(Entry(name, tensor.dtype, shape, "raw"), tensor)
    form, table = write_values(alphabet.values)
    entry = Entry(
        name, tensor.dtype, shape, "few", form=form, num_values=len(alphabet.values),
        num_nonzeros=int((tensor != 0).sum()),
    )  # fmt: skip
    if coding == "huffman":
        entry = replace(entry, index_bits=index_bits or default_index_bits(tensor.dim()))
    elif tensor.dim() > 1 and 0 < entry.num_nonzeros < tensor.numel() <= _MAX_SEARCHED_ELEMENTS:
        entry = _best_way(entry, alphabet.codes_of(tensor))
    return Part(entry, tensor, alphabet, table)


def _best_way(entry: Entry, codes: Codes) -> Entry:
    """Return the entry with the order and the weighing under which places take fewest bits."""
    ways = []
    for is_transposed in (False, True):
        way = replace(entry, is_transposed=is_transposed)
        rows = rows_of(codes, way)
        ways.append((*choose_lags(rows), way, rows))
    weighing, bits, way, rows = min(ways, key=lambda found: found[1])
    return replace(way, weighing=choose_settings(rows, weighing, bits))
