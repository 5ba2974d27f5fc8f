"""Bytes of messages: small integers, indices as gaps, values in few bits, entropy-coded symbols.

Indices of a share p of all elements, chosen at random, hold log2(1/p) + 1.44 bits each. Their gaps
are then geometric, and Rice's code takes 0.03 bits more than that, which no entropy coder would
win back. Codes of a quantizer that are nearly all zero are another matter: for these there is
`write_symbols`, through constriction's asymmetric numeral systems.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from packlight.errors import FormatError, MissingExtraError
from packlight.extras import require_numba

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

VALUE_FORMATS = ("fp32", "bf16", "q8", "q4", "q2", "q1")
MAX_LOW_BITS = 48


def kernels() -> Any:
    """Return the module of compiled functions.

    Raises:
        MissingExtraError: numba is not installed.
    """
    require_numba("comm", "packlight.comm")
    from packlight.comm import kernels as compiled

    return compiled


class Reader:
    """The bytes of a message, from the first to the last.

    Args:
        content: all of them.
    """

    def __init__(self, content: Bytes) -> None:
        self._content, self._at = content, 0

    def take(self, num_bytes: int) -> Bytes:
        """Return the next bytes.

        Raises:
            FormatError: there are not so many left.
        """
        if num_bytes > len(self._content) - self._at:
            raise FormatError(
                f"a message ends after {len(self._content)} bytes, in the middle of {num_bytes}"
            )
        part = self._content[self._at : self._at + num_bytes]
        self._at += num_bytes
        return part

    def rest(self) -> Bytes:
        """Return all bytes that are left."""
        return self.take(len(self._content) - self._at)

    def integer(self) -> int:
        """Return the next integer that `integer` wrote."""
        value = shift = 0
        while True:
            byte = int(self.take(1)[0])
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def floats(self, count: int) -> Floats:
        """Return the next float32 numbers."""
        return self.take(4 * count).copy().view(np.float32)

    def brains(self, count: int) -> Floats:
        """Return the next bfloat16 numbers, as float32."""
        words = self.take(2 * count).copy().view(np.uint16)
        return (words.astype(np.uint32) << 16).view(np.float32)


def integer(value: int) -> Bytes:
    """Return an integer of at least 0, seven bits to a byte."""
    digits = []
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return np.array([*digits, value], np.uint8)


def brains(values: Floats) -> Bytes:
    """Return float32 numbers as bfloat16, rounded to nearest even; NaN stays NaN."""
    words = values.view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16).view(np.uint8)


# -- indices


def write_indices(indices: Indices, limit: int) -> Bytes:
    """Return ascending indices below `limit` in Rice's code, with their number in front."""
    count = len(indices)
    if count == 0:
        return integer(0)
    num_low = _low_bits(indices, limit)
    high = int((np.diff(indices, prepend=-1) - 1 >> num_low).sum())
    packed = np.zeros((high + count * (num_low + 1) + 7) // 8, np.uint8)
    kernels().write_gaps(indices, num_low, packed)
    return np.concatenate([integer(count), np.array([num_low], np.uint8), packed])


def _low_bits(indices: Indices, limit: int) -> int:
    """Return how many low bits of gaps Rice's code sends as they are; the best of the likely."""
    gaps = np.diff(indices, prepend=-1) - 1
    likely = int(math.log2(max(float(gaps.mean()) * math.log(2), 1)))
    choices = range(max(likely - 1, 0), likely + 3)
    return min(choices, key=lambda low: int((gaps >> low).sum()) + len(gaps) * (low + 1))


def read_indices(reader: Reader, limit: int) -> Indices:
    """Return the indices that `write_indices` wrote.

    Raises:
        FormatError: what is there are no such indices.
    """
    count = reader.integer()
    if count == 0:
        return np.empty(0, np.int64)
    num_low = int(reader.take(1)[0])
    if count > limit or num_low > MAX_LOW_BITS:
        raise FormatError(f"a message has {count} indices of {limit} elements")
    indices = np.empty(count, np.int64)
    packed = reader.rest()
    num_bits = kernels().read_gaps(packed, num_low, limit, indices)
    if num_bits < 0:
        raise FormatError("a message's indices do not ascend within the gradient")
    reader._at -= len(packed) - (int(num_bits) + 7) // 8
    return indices


# -- values of single elements


def write_values(values: Floats, form: str) -> Bytes:
    """Return values in few bits.

    "q1" is a sign and their mean magnitude; "q2" a sign and one of two magnitudes, the means of
    those below and above the mean; "q4", "q8" multiples of the largest one's share.
    """
    if form == "fp32":
        return values.view(np.uint8)
    if form == "bf16":
        return brains(values)
    magnitudes = np.abs(values)
    if form in ("q4", "q8"):
        return _write_multiples(values, 4 if form == "q4" else 8)
    if form == "q1":
        levels = magnitudes.mean(keepdims=True) if len(values) else np.zeros(1, np.float32)
        bits = values < 0
        return np.concatenate([brains(levels), np.packbits(bits)])
    is_high = magnitudes > (magnitudes.mean() if len(values) else 0)
    levels = np.array([
        part.mean() if len(part) else 0.0 for part in (magnitudes[~is_high], magnitudes[is_high])
    ], np.float32)
    return np.concatenate([brains(levels), np.packbits(np.concatenate([values < 0, is_high]))])


def read_values(reader: Reader, count: int, form: str) -> Floats:
    """Return the values that `write_values` wrote."""
    if form == "fp32":
        return reader.floats(count)
    if form == "bf16":
        return reader.brains(count)
    if form in ("q4", "q8"):
        return _read_multiples(reader, count, 4 if form == "q4" else 8)
    levels = reader.brains(1 if form == "q1" else 2)
    num_bits = count if form == "q1" else 2 * count
    bits = np.unpackbits(reader.take((num_bits + 7) // 8), count=num_bits).astype(bool)
    magnitudes = levels[bits[count:].astype(np.int64)] if form == "q2" else levels
    return np.where(bits[:count], -magnitudes, magnitudes).astype(np.float32)


def _write_multiples(values: Floats, bits: int) -> Bytes:
    compiled = kernels()
    scale = np.zeros(1, np.float32)
    packed = np.empty(compiled.packed_bytes(len(values), compiled.TILE, 8 // bits), np.uint8)
    block = _one_block(len(values))
    compiled.quantize(
        values, block, compiled.LARGEST, 2 ** (bits - 1) - 1, False, 0, 0, 8 // bits, 2**bits,
        scale, packed,
    )
    return np.concatenate([scale.view(np.uint8), packed])


def _read_multiples(reader: Reader, count: int, bits: int) -> Floats:
    compiled = kernels()
    scale = reader.floats(1)
    packed = reader.take(compiled.packed_bytes(count, compiled.TILE, 8 // bits))
    values = np.zeros(count, np.float32)
    compiled.add_dequantized(
        packed, scale, _one_block(count), 2 ** (bits - 1) - 1, 8 // bits, 2**bits, values
    )
    return values


def _one_block(count: int) -> int:
    return -(-max(count, 1) // 256) * 256


# -- symbols


def write_symbols(symbols: Bytes, num_symbols: int) -> Bytes:
    """Return symbols below `num_symbols` coded by how often each occurs, with those counts.

    Raises:
        MissingExtraError: constriction is not installed.
    """
    counts = np.bincount(symbols, minlength=num_symbols)
    header = [integer(int(count)) for count in counts]
    coder, model = _ans()
    encoder = coder()
    if np.count_nonzero(counts) > 1:
        encoder.encode_reverse(symbols.astype(np.int32), model(counts))
    return np.concatenate([*header, encoder.get_compressed().view(np.uint8)])


def read_symbols(reader: Reader, num_symbols: int) -> Bytes:
    """Return the symbols that `write_symbols` wrote; they are all that is left."""
    counts = np.array([reader.integer() for _ in range(num_symbols)])
    if np.count_nonzero(counts) <= 1:
        return np.repeat(np.arange(num_symbols), counts).astype(np.uint8)
    coder, model = _ans()
    words = reader.rest().copy().view(np.uint32)
    symbols: Bytes = coder(words).decode(model(counts), int(counts.sum())).astype(np.uint8)
    return symbols


def _ans() -> tuple[Any, Callable[[npt.NDArray[np.int64]], Any]]:
    try:
        from constriction import stream
    except ImportError as error:
        raise MissingExtraError("constriction", "comm", "entropy-coded messages") from error

    def model(counts: npt.NDArray[np.int64]) -> Any:
        # The same integers on all ranks give the same model.
        return stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)

    return stream.stack.AnsCoder, model
