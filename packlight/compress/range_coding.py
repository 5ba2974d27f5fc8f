"""A tensor through a range coder, in as many bits as its own past makes each weight worth.

A queue (range coder) rather than a stack (ANS), since what is learnt on the way has to be learnt in
the same order on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from packlight.compress.alphabet import Codes
from packlight.compress.contexts import (
    WEIGHINGS,
    Positions,
    Signs,
    Values,
    Weighing,
    likely_lags,
)
from packlight.compress.packages import constriction

# So many elements at most share a block of the file: what a reader holds of it at one time.
MAX_BLOCK_ELEMENTS = 1 << 22
_RAW_ELEMENTS = 1 << 14


class RangeWriter:
    """A range encoder whose words go into a file's blocks.

    Args:
        write_block: takes a block's bytes.
    """

    def __init__(self, write_block: Callable[[bytes], None]) -> None:
        self._write_block = write_block
        self._num_elements = 0
        self._num_bits_before = 0
        self.encoder = constriction().stream.queue.RangeEncoder()

    @property
    def num_bits(self) -> int:
        """So far, give or take the word that is under way."""
        return self._num_bits_before + int(self.encoder.num_bits())

    def count(self, num_elements: int) -> None:
        """Note that so many elements were encoded; between them and the next a block may end."""
        self._num_elements += num_elements
        if self._num_elements >= MAX_BLOCK_ELEMENTS:
            self.flush()

    def flush(self) -> None:
        """End the block."""
        if self._num_elements:
            self._num_bits_before = self.num_bits
            words: npt.NDArray[np.uint32] = self.encoder.get_compressed()
            block = words.astype("<u4").tobytes()
            # The last word's high bytes may be zero; a reader fills the word up again.
            self._write_block(block[:-3] + block[-3:].rstrip(b"\0"))
            self.encoder = constriction().stream.queue.RangeEncoder()
            self._num_elements = 0


class RangeReader:
    """The other end of a `RangeWriter`.

    Args:
        read_block: returns the next block's bytes.
    """

    def __init__(self, read_block: Callable[[], bytes]) -> None:
        self._read_block = read_block
        self._num_elements = 0
        self._decoder: Any = None

    @property
    def decoder(self) -> Any:
        """A range decoder of the block that is being read."""
        if self._decoder is None:
            block = self._read_block()
            block += bytes(-len(block) % 4)
            words = np.frombuffer(block, dtype="<u4").astype(np.uint32)
            self._decoder = constriction().stream.queue.RangeDecoder(words)
        return self._decoder

    def count(self, num_elements: int) -> None:
        """Note that so many elements were decoded, as the writer did."""
        self._num_elements += num_elements
        if self._num_elements >= MAX_BLOCK_ELEMENTS:
            self.end_block()

    def end_block(self) -> None:
        """Go on with the next block, as the writer did when it flushed."""
        self._decoder, self._num_elements = None, 0


class RowCoder:
    """What an encoder and a decoder of one tensor do alike.

    Args:
        num_columns: of a row.
        num_codes: zero included.
        num_nonzeros: in the whole tensor, which the file tells first.
        num_elements: of the whole tensor.
        weighing: of the past.
        num_negative: how many of the codes stand for negative values.
    """

    def __init__(
        self,
        num_columns: int,
        num_codes: int,
        num_nonzeros: int,
        num_elements: int,
        weighing: Weighing,
        num_negative: int = 0,
    ) -> None:
        self.num_columns = num_columns
        self.is_empty = num_nonzeros == 0
        self.is_full = num_nonzeros == num_elements
        density = num_nonzeros / max(1, num_elements)
        self.positions = Positions(num_columns, density, weighing)
        self.signs = Signs(num_columns, num_negative, weighing.lags)
        # Of one value there is nothing to tell.
        num_values = num_codes - 1
        self.values = Values(num_values, self.signs.num_contexts) if num_values > 1 else None

    def encode(self, encoder: Any, row: Codes) -> None:
        """Put a row of codes into a range encoder."""
        is_weight = row != 0
        if not self.is_empty and not self.is_full:
            family = constriction().stream.model.Bernoulli(perfect=False)
            for begin, end, likely in self._segments(is_weight):
                encoder.encode(is_weight[begin:end].astype(np.int32), family, likely)
        self._code_values(row[is_weight] - 1, is_weight, encoder.encode)
        self.signs.learn(row)

    def decode(self, decoder: Any) -> Codes:
        """Take a row of codes out of a range decoder."""
        is_weight = np.full(self.num_columns, self.is_full)
        if not self.is_empty and not self.is_full:
            family = constriction().stream.model.Bernoulli(perfect=False)
            for begin, end, likely in self._segments(is_weight):
                is_weight[begin:end] = decoder.decode(family, likely)
        row = np.zeros(self.num_columns, dtype=np.int32)
        values = np.zeros(np.count_nonzero(is_weight), dtype=np.int32)

        def decode(values: Codes, model: Any, *likely: Any) -> None:
            values[:] = decoder.decode(model, *(likely or (len(values),)))

        self._code_values(values, is_weight, decode)
        row[is_weight] = values + 1
        self.signs.learn(row)
        return row

    def estimate(self, row: Codes) -> float:
        """Return about how many bits the places in a row take, without a coder."""
        is_weight = row != 0
        bits = 0.0
        if not self.is_empty and not self.is_full:
            for begin, end, likely in self._segments(is_weight):
                here = is_weight[begin:end]
                bits -= float(np.log2(np.where(here, likely, 1 - likely)).sum())
        return bits

    def _segments(self, is_weight: Any) -> Iterator[tuple[int, int, Any]]:
        """Yield (begin, end, probabilities); a segment's cells are filled in before the next."""
        cells = self.positions.begin_row()
        num_seen = num_expected = 0
        for begin, end in self.positions.segments():
            expected = cells[begin:end]
            yield begin, end, self.positions.likely(expected, num_seen, num_expected)
            num_seen += int(np.count_nonzero(is_weight[begin:end]))
            num_expected += int(expected.sum())
        self.positions.learn(is_weight)

    def _code_values(
        self, values: Codes, is_weight: npt.NDArray[np.bool_], code: Callable[..., None]
    ) -> None:
        """Code the values of a row's weights, block by block.

        Args:
            values: to encode, or where decoded ones are put.
            is_weight: where in the row they are.
            code: given a block of values, a model, and probabilities for each if they differ.
        """
        if self.values is None:
            return
        contexts = self.signs.contexts()[is_weight] if self.signs.num_contexts > 1 else None
        for begin, end in self.values.blocks(len(values)):
            block = values[begin:end]
            if contexts is None:
                code(block, _categorical(self.values))
                self.values.learn(block)
            else:
                here = contexts[begin:end]
                family = constriction().stream.model.Categorical(perfect=False)
                code(block, family, self.values.likely(here))
                self.values.learn(block, here)


def estimate_bits(rows: Codes, weighing: Weighing) -> float:
    """Return about how many bits the places of a tensor's weights take under a weighing."""
    coder = RowCoder(rows.shape[1], 1, int(np.count_nonzero(rows)), rows.size, weighing)
    return sum(coder.estimate(row) for row in rows)


def choose_lags(rows: Codes) -> tuple[Weighing, float]:
    """Return a weighing with the lags under which places take fewest bits, and those bits.

    Args:
        rows: codes.
    """
    best = Weighing()
    best_bits = estimate_bits(rows, best)
    lags = likely_lags(rows != 0)
    for num in range(1, len(lags) + 1):
        best, best_bits = _better(rows, replace(best, lags=tuple(lags[:num])), best, best_bits)
    return best, best_bits


def choose_settings(rows: Codes, best: Weighing, best_bits: float) -> Weighing:
    """Return a weighing with the same lags under which places take few bits.

    One setting after the other is tried.

    Args:
        rows: codes.
        best: to begin with.
        best_bits: under that.
    """
    for setting in ("row", "column", "neighbours"):
        for value in sorted({getattr(weighing, setting) for weighing in WEIGHINGS}):
            other = replace(best, **{setting: value})
            best, best_bits = _better(rows, other, best, best_bits)
    return best


def _better(
    rows: Codes, other: Weighing, best: Weighing, best_bits: float
) -> tuple[Weighing, float]:
    if other == best:
        return best, best_bits
    bits = estimate_bits(rows, other) + 8 * len(other.lags)
    return (other, bits) if bits < best_bits else (best, best_bits)


# -- tensors without an alphabet: their bytes, each place of an element on its own


def encode_bytes(writer: RangeWriter, content: bytes, element_bytes: int) -> None:
    """Encode a tensor's bytes; those of exponents are worth less than eight bits."""
    planes = np.frombuffer(content, dtype=np.uint8).reshape(-1, element_bytes)
    models = [Values(256) for _ in range(element_bytes)]
    for begin in range(0, len(planes), _RAW_ELEMENTS):
        part = planes[begin : begin + _RAW_ELEMENTS]
        for place, values in enumerate(models):
            column = part[:, place].astype(np.int32)
            for first, last in values.blocks(len(column)):
                writer.encoder.encode(column[first:last], _categorical(values))
                values.learn(column[first:last])
        writer.count(len(part))


def decode_bytes(reader: RangeReader, num_elements: int, element_bytes: int) -> bytes:
    """Decode what `encode_bytes` encoded."""
    planes = np.empty((num_elements, element_bytes), dtype=np.uint8)
    models = [Values(256) for _ in range(element_bytes)]
    for begin in range(0, num_elements, _RAW_ELEMENTS):
        part = planes[begin : begin + _RAW_ELEMENTS]
        for place, values in enumerate(models):
            for first, last in values.blocks(len(part)):
                found = reader.decoder.decode(_categorical(values), last - first)
                part[first:last, place] = found
                values.learn(found)
        reader.count(len(part))
    return planes.tobytes()


def _categorical(values: Values) -> Any:
    return constriction().stream.model.Categorical(values.likely(), perfect=False)
