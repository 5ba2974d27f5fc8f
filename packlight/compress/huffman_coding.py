"""A tensor's codes as Deep Compression writes them (Han, Mao, Dally 2016, arXiv 1510.00149).

Weights that are not zero are told by how far each is from the one before, in `index_bits` bits;
where that does not suffice, a zero is told as if it were a weight (figure 2). Both streams,
distances and codes, are Huffman-coded (section 4), each with the counts of its symbols before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from packlight.compress.alphabet import Codes, read_varint, write_varint
from packlight.compress.packages import constriction


def default_index_bits(num_dims: int) -> int:
    """Return the paper's: 8 bits for convolutions, 5 for matrices."""
    return 8 if num_dims > 2 else 5


def encode_sparse(codes: Codes, num_codes: int, index_bits: int) -> bytes:
    """Return all codes of a tensor, flat, as one block.

    Args:
        codes: int32 [N].
        num_codes: zero included.
        index_bits: of a distance.
    """
    distances, told = relative_index(codes, index_bits)
    # A distance of 0 does not occur.
    return b"".join([
        write_varint(len(told)),
        _encode_stream(distances - 1, 1 << index_bits),
        _encode_stream(told, num_codes),
    ])


def decode_sparse(block: bytes, num_elements: int, num_codes: int, index_bits: int) -> Codes:
    """Return the codes of a block, int32 [num_elements].

    Raises:
        ValueError: it is no such block.
    """
    num_told, offset = read_varint(block, 0)
    distances, offset = _decode_stream(block, offset, num_told, 1 << index_bits)
    told, offset = _decode_stream(block, offset, num_told, num_codes)
    places = np.cumsum(distances + 1, dtype=np.int64) - 1
    if num_told and places[-1] >= num_elements:
        raise ValueError(f"a weight at {places[-1]} of {num_elements}")
    codes = np.zeros(num_elements, dtype=np.int32)
    codes[places] = told
    return codes


def relative_index(codes: Codes, index_bits: int) -> tuple[Codes, Codes]:
    """Return (distances, codes) of what is told, fillers included.

    >>> relative_index(np.array([0, 7, 0, 0, 0, 0, 0, 5], dtype=np.int32), index_bits=2)
    (array([2, 4, 2], dtype=int32), array([7, 0, 5], dtype=int32))
    """
    reach = 1 << index_bits
    places = np.flatnonzero(codes)
    gaps = np.diff(places, prepend=-1)
    num_fillers = (gaps - 1) // reach
    last_of_each = np.cumsum(num_fillers + 1) - 1
    num_told = len(places) + int(num_fillers.sum())
    distances = np.full(num_told, reach, dtype=np.int32)
    told = np.zeros(num_told, dtype=np.int32)
    distances[last_of_each] = gaps - num_fillers * reach
    told[last_of_each] = codes[places]
    return distances, told


def _encode_stream(symbols: Codes, num_symbols: int) -> bytes:
    counts = np.bincount(symbols, minlength=num_symbols)
    used = np.flatnonzero(counts)
    head = write_varint(len(used)) + b"".join(
        write_varint(int(step)) + write_varint(int(counts[symbol]))
        for step, symbol in zip(np.diff(used, prepend=0), used, strict=True)
    )
    if len(used) < 2:
        return head
    symbol_coder = constriction().symbol
    tree = symbol_coder.huffman.EncoderHuffmanTree(counts[used].astype(np.float64))
    encoder = symbol_coder.QueueEncoder()
    for rank in np.searchsorted(used, symbols).tolist():
        encoder.encode_symbol(rank, tree)
    words, num_bits = encoder.get_compressed_and_bitrate()
    content: bytes = words.astype("<u4").tobytes()[: (num_bits + 7) // 8]
    return head + write_varint(len(content)) + content


def _decode_stream(
    block: bytes, offset: int, num: int, num_symbols: int
) -> tuple[npt.NDArray[Any], int]:
    num_used, offset = read_varint(block, offset)
    used, counts, symbol = [], [], 0
    for _ in range(num_used):
        step, offset = read_varint(block, offset)
        count, offset = read_varint(block, offset)
        symbol += step
        used.append(symbol)
        counts.append(count)
    if sum(counts) != num or symbol >= num_symbols:
        raise ValueError("a table of symbols does not fit its stream")
    if num_used < 2:
        return np.full(num, symbol, dtype=np.int32), offset
    size, offset = read_varint(block, offset)
    content = block[offset : offset + size]
    if len(content) < size:
        raise ValueError("a stream ends early")
    words = np.frombuffer(content + bytes(-size % 4), dtype="<u4").astype(np.uint32)
    symbol_coder = constriction().symbol
    tree = symbol_coder.huffman.DecoderHuffmanTree(np.array(counts, dtype=np.float64))
    decoder = symbol_coder.QueueDecoder(words)
    ranks = [decoder.decode_symbol(tree) for _ in range(num)]
    return np.array(used, dtype=np.int32)[ranks], offset + size
