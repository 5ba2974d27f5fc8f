"""The file's frame: magic, version, header, blocks, checksum.

    "PKLC"  version (1 byte)
    length  header: JSON, deflated with a dictionary of the words that headers are made of
    length  tables: the values of all alphabets, one after the other
    length  block, again and again; a length of 0 ends them
    CRC-32 of all that is before it, 4 bytes, little-endian

Lengths are integers in bytes of 7 bits. A reader holds one block at a time.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import IO, Any

from packlight.compress.alphabet import read_varint, write_varint
from packlight.compress.errors import AlteredFileError, NewerFileError, TruncatedFileError

MAGIC = b"PKLC"
VERSION = 1
_MAX_HEADER_BYTES = 1 << 26
_PIECE = 1 << 16
_CHECKSUM_BYTES = 4

# Never to be changed within a version: files do not hold it.
_WORDS = (
    b'running_mean running_var num_batches_tracked embedding norm attention self_attn mlp proj '
    b'query key value downsample layer block conv bn fc features classifier head in_proj out_proj '
    b'["bfloat16","float16","float64","uint8","int8","int32","bool","raw",[]],"tied",'
    b'"int64",[],"raw"],[".weight",".bias","float32","plain","huffman","half","grid",'
    b'{"meta":{"error_percent":"seed":},"coding":"range","tensors":[["0.weight","float32",['
)


class FrameWriter:
    """Writes a file's frame.

    Args:
        file: open for writing bytes.
        header: JSON, any.
        tables: bytes.
    """

    def __init__(self, file: IO[bytes], header: Any, tables: bytes) -> None:
        self._file = file
        self._checksum = 0
        self.num_bytes = 0
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _WORDS)
        self._write(MAGIC + bytes([VERSION]))
        for part in (packer.compress(text.encode()) + packer.flush(), tables):
            self._write(write_varint(len(part)) + part)

    def write_block(self, block: bytes) -> None:
        """Write a block; its length is stored plus one, as 0 is the end."""
        self._write(write_varint(len(block) + 1) + block)

    def finish(self) -> None:
        """Write the end and the checksum."""
        self._write(b"\0")
        self._write(self._checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.num_bytes += len(content)


class FrameReader:
    """Reads a file's frame, after its checksum was found right.

    Attributes:
        header: what was written.
        tables: likewise.
        num_bytes: of the whole file.

    Raises:
        NewerFileError: it was written by a later release.
        TruncatedFileError: it ends early.
        AlteredFileError: its bytes are not those that were written, or never were such a file.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        start = self._take(len(MAGIC) + 1)
        if start[:-1] != MAGIC:
            raise AlteredFileError(path, f"begins with {start[:-1]!r}, not with {MAGIC!r}")
        if start[-1] > VERSION:
            raise NewerFileError(path, start[-1], VERSION)
        self.num_bytes = self._check()
        try:
            unpacker = zlib.decompressobj(-15, _WORDS)
            text = unpacker.decompress(self._part(), _MAX_HEADER_BYTES)
            self.header = json.loads(text)
        except (zlib.error, ValueError) as error:
            raise AlteredFileError(path, f"has no readable header: {error}") from error
        self.tables = self._part()

    def read_block(self) -> bytes:
        """Return the next block.

        Raises:
            AlteredFileError: there is none.
        """
        length = self._length()
        if not length:
            raise AlteredFileError(self._path, "has fewer blocks than its header needs")
        return self._take(length - 1)

    def finish(self) -> None:
        """Raise `AlteredFileError` if there is a further block."""
        if self._length():
            raise AlteredFileError(self._path, "has more blocks than its header needs")

    def _check(self) -> int:
        """Read the file once, a piece at a time; return its size, and to where reading was."""
        begin = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        checksum, remaining = 0, size - _CHECKSUM_BYTES
        while remaining > 0:
            piece = self._take(min(_PIECE, remaining))
            checksum = zlib.crc32(piece, checksum)
            remaining -= len(piece)
        written = self._file.read(_CHECKSUM_BYTES)
        if remaining or written != checksum.to_bytes(_CHECKSUM_BYTES, "little"):
            self._file.seek(begin)
            self._walk(size)
            raise AlteredFileError(self._path, "does not have the checksum that it states")
        self._file.seek(begin)
        return size

    def _walk(self, size: int) -> None:
        """Raise `TruncatedFileError` if the file ends before what its lengths announce."""
        for _ in ("header", "tables"):
            self._file.seek(self._length(), os.SEEK_CUR)
        while length := self._length():
            self._file.seek(length - 1, os.SEEK_CUR)
        if (needed := self._file.tell() + _CHECKSUM_BYTES) > size:
            raise TruncatedFileError(self._path, size, needed)

    def _part(self) -> bytes:
        return self._take(self._length())

    def _length(self) -> int:
        written = bytearray()
        while not written or written[-1] >= 128:
            written += self._take(1)
            if len(written) > 9:
                raise AlteredFileError(self._path, "has a length that does not end")
        return read_varint(bytes(written), 0)[0]

    def _take(self, num: int) -> bytes:
        begin = self._file.tell()
        content = self._file.read(num)
        if len(content) < num:
            size = self._file.seek(0, os.SEEK_END)
            raise TruncatedFileError(self._path, size, begin + num)
        return content
