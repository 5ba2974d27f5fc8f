"""`save` and `load`: a model's tensors in one file, each as small as its values allow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from packlight.compress.accounts import FileReport, TensorReport
from packlight.compress.alphabet import Alphabet, bytes_tensor, read_values, tensor_bytes
from packlight.compress.container import FrameReader, FrameWriter
from packlight.compress.entries import Entry, Part, parts_of
from packlight.compress.errors import AlteredFileError, ModelMismatchError
from packlight.compress.huffman_coding import decode_sparse, encode_sparse
from packlight.compress.range_coding import (
    RangeReader,
    RangeWriter,
    RowCoder,
    decode_bytes,
    encode_bytes,
)
from packlight.errors import OptionError

CODINGS = ("range", "huffman")


def save(
    path: str | Path,
    model: nn.Module | Mapping[str, torch.Tensor],
    *,
    coding: str = "range",
    index_bits: Mapping[str, int] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> FileReport:
    """Write all of a model's tensors into one file, and return what each takes there.

    Nothing is rounded: `load` gives every value back, bit for bit (a negative zero as a zero). So
    what makes a file small are weights that are zero (`Pruner`) and weights that share few values
    (`share`). A tensor with few distinct values is stored as those values and, for each element,
    which it is; any other as its bytes. Both go through an entropy coder. Tensors that share
    memory are stored once.

    The file appears complete or not at all. Memory beside the model: the codes of one tensor, and
    a block of some 4 million coded elements.

    Args:
        path: of the file.
        model: its `state_dict()` is saved; or a dict of tensors.
        coding: "range": a range coder that learns while it codes where weights are and which values
            they have. "huffman": the format of Deep Compression (arXiv 1510.00149), distances and
            codes with Huffman's code; larger, there to compare with.
        index_bits: for "huffman", the bits of a distance by tensor's name; else 8 for convolutions,
            5 for matrices.
        meta: anything in JSON that is to be in the file, such as its error.

    Raises:
        CompressionError: something is no dense tensor, or of a dtype that files do not hold.
        OptionError: an unknown coding.
        MissingExtraError: constriction is not installed.

    >>> import packlight.compress, tempfile
    >>> model = nn.Linear(64, 64, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_((torch.arange(4096).reshape(64, 64) % 50 == 0) * 0.25)
    >>> path = Path(tempfile.mkdtemp()) / "model.plc"
    >>> report = packlight.compress.save(path, model, meta={"error_percent": 1.5})
    >>> report.dense_bytes, report.file_bytes == path.stat().st_size, report.ratio > 50
    (16384, True, True)
    >>> torch.equal(packlight.compress.load(path)["weight"], model.weight)
    True
    """
    if coding not in CODINGS:
        raise OptionError(f"coding={coding!r}\nhint: one of {', '.join(CODINGS)}")
    path = Path(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    parts = parts_of(state, coding, index_bits or {})
    header: dict[str, Any] = {"coding": coding, "tensors": [p.entry.to_json() for p in parts]}
    if meta:
        header = {"meta": dict(meta), **header}
    with _written_whole(path) as file:
        frame = FrameWriter(file, header, b"".join(part.table for part in parts))
        sizes = _write_parts(frame, parts, coding)
        frame.finish()
    return _report(parts, coding, header, frame.num_bytes, sizes)


def load(
    path: str | Path, into: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Return a file's tensors, and load them into a model if one is given.

    The file is read twice: once for its checksum, once to decode it, a block at a time. The model
    is touched when all of it has been decoded; one on the meta device takes the new tensors over,
    so that they are held once.

    Args:
        path: of a file that `save` wrote.
        into: a model with the same tensors.

    Returns:
        Tensors by name, on the CPU; tied ones are one tensor.

    Raises:
        TruncatedFileError, AlteredFileError, NewerFileError: it cannot be read.
        ModelMismatchError: names, shapes or dtypes differ.
        MissingExtraError: constriction is not installed.
    """
    path = Path(path)
    with path.open("rb") as file:
        frame = FrameReader(file, path)
        entries, _ = _header(frame, path)
        if into is not None:
            _check_match(path, entries, into)
        loaded: dict[str, torch.Tensor] = {}
        for name, tensor in _decoded(frame, path):
            loaded[name] = tensor
    if into is not None:
        is_meta = any(tensor.is_meta for tensor in into.state_dict().values())
        into.load_state_dict(loaded, assign=is_meta)
    return loaded


def stream(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's tensors one by one, in the order of the model; one is held at a time.

    Beside it there is a block of the file, of some 4 million coded elements at most. A tensor that
    is tied to one before it is yielded as (name, an empty tensor), since that one may be gone.

    Args:
        path: of a file that `save` wrote.

    Raises:
        TruncatedFileError, AlteredFileError, NewerFileError: before the first tensor.
    """
    path = Path(path)
    with path.open("rb") as file:
        yield from _decoded(FrameReader(file, path), path, ties=False)


def inspect(path: str | Path) -> FileReport:
    """Return what a file holds, without decoding it.

    Args:
        path: of a file that `save` wrote.

    Raises:
        TruncatedFileError, AlteredFileError, NewerFileError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        frame = FrameReader(file, path)
        entries, coding = _header(frame, path)
    parts = [Part(entry, torch.empty(0)) for entry in entries]
    return _report(parts, coding, frame.header, frame.num_bytes, None)


# -- writing


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Give a file that gets its name when all is written."""
    with tempfile.NamedTemporaryFile(
        "wb", dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as file:
        try:
            yield file
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _write_parts(frame: FrameWriter, parts: list[Part], coding: str) -> list[int]:
    """Write all tensors' blocks and return the bytes of each."""
    writer = RangeWriter(frame.write_block)
    sizes = []
    for part in parts:
        entry = part.entry
        bits_before, bytes_before = writer.num_bits, frame.num_bytes
        if entry.kind == "raw":
            encode_bytes(writer, tensor_bytes(part.tensor), entry.dtype.itemsize)
        elif entry.kind == "few" and coding == "huffman":
            assert part.alphabet is not None
            codes = part.alphabet.codes_of(part.tensor)
            writer.flush()
            bytes_before = frame.num_bytes
            frame.write_block(encode_sparse(codes, entry.num_values + 1, entry.index_bits))
            sizes.append(len(part.table) + frame.num_bytes - bytes_before)
            continue
        elif entry.kind == "few":
            assert part.alphabet is not None
            coder = _coder(entry, part.alphabet)
            for row in part.rows():
                coder.encode(writer.encoder, row)
                writer.count(len(row))
        sizes.append(len(part.table) + (writer.num_bits - bits_before) // 8)
    writer.flush()
    return sizes


def _coder(entry: Entry, alphabet: Alphabet) -> RowCoder:
    return RowCoder(
        entry.matrix_shape[1], entry.num_values + 1, entry.num_nonzeros, entry.num_elements,
        entry.weighing, alphabet.num_negative,
    )  # fmt: skip


def _report(
    parts: list[Part], coding: str, header: dict[str, Any], num_bytes: int, sizes: list[int] | None
) -> FileReport:
    tensors = []
    for index, part in enumerate(parts):
        entry = part.entry
        is_few = entry.kind == "few"
        dense_bytes = 0 if entry.kind == "tied" else entry.num_elements * entry.dtype.itemsize
        tensors.append(
            TensorReport(
                entry.name, str(entry.dtype).removeprefix("torch."), entry.shape,
                entry.num_elements, entry.num_nonzeros if is_few else None,
                entry.num_values if is_few else None, dense_bytes,
                sizes[index] if sizes is not None else None,
            )
        )  # fmt: skip
    return FileReport(
        num_bytes, sum(tensor.dense_bytes for tensor in tensors),
        num_bytes - sum(sizes) if sizes is not None else None, coding, tuple(tensors),
        header.get("meta", {}),
    )  # fmt: skip


# -- reading


def _header(frame: FrameReader, path: Path) -> tuple[list[Entry], str]:
    try:
        coding = frame.header["coding"]
        if coding not in CODINGS:
            raise ValueError(f"its coding is {coding!r}")
        entries = [Entry.from_json(line, coding) for line in frame.header["tensors"]]
        return entries, coding
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise AlteredFileError(path, f"has a header without sense: {error}") from error


def _decoded(
    frame: FrameReader, path: Path, *, ties: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    entries, coding = _header(frame, path)
    reader = RangeReader(frame.read_block)
    offset = 0
    homes: dict[str, torch.Tensor] = {}
    tied_to = {entry.tied_to for entry in entries} if ties else set()
    try:
        for entry in entries:
            if entry.kind == "tied":
                yield entry.name, homes[entry.tied_to] if ties else torch.empty(0)
                continue
            if entry.kind == "raw":
                content = decode_bytes(reader, entry.num_elements, entry.dtype.itemsize)
                tensor = bytes_tensor(content, entry.dtype)
            else:
                values, offset = read_values(
                    entry.form, frame.tables, offset, entry.num_values, entry.dtype
                )
                tensor = _few(entry, Alphabet(values), coding, frame, reader)
            tensor = tensor.reshape(entry.shape)
            if entry.name in tied_to:
                homes[entry.name] = tensor
            yield entry.name, tensor
        frame.finish()
        if offset != len(frame.tables):
            raise ValueError(f"{len(frame.tables) - offset} bytes of tables are left")
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, AlteredFileError):
            raise
        raise AlteredFileError(path, f"does not decode: {error}") from error


def _few(
    entry: Entry, alphabet: Alphabet, coding: str, frame: FrameReader, reader: RangeReader
) -> torch.Tensor:
    if coding == "huffman":
        reader.end_block()
        codes = decode_sparse(
            frame.read_block(), entry.num_elements, entry.num_values + 1, entry.index_bits
        )
        return alphabet.tensor_of(codes)
    num_rows, num_columns = entry.matrix_shape
    tensor = torch.empty(num_rows, num_columns, dtype=entry.dtype)
    if entry.is_transposed:
        tensor = torch.empty(num_columns, num_rows, dtype=entry.dtype)
    rows = tensor.T if entry.is_transposed else tensor
    coder, num_nonzeros = _coder(entry, alphabet), 0
    for row in rows:
        codes = coder.decode(reader.decoder)
        row.copy_(alphabet.tensor_of(codes))
        num_nonzeros += int(np.count_nonzero(codes))
        reader.count(num_columns)
    if num_nonzeros != entry.num_nonzeros:
        raise ValueError(f"{entry.name} has {num_nonzeros} weights, not {entry.num_nonzeros}")
    return tensor


def _check_match(path: Path, entries: list[Entry], model: nn.Module) -> None:
    state = model.state_dict()
    held = {entry.name: f"{entry.dtype} {entry.shape}" for entry in entries}
    wanted = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()}
    missing = [name for name in wanted if name not in held]
    unexpected = [name for name in held if name not in wanted]
    different = [
        (name, held[name], wanted[name])
        for name in held
        if name in wanted and held[name] != wanted[name]
    ]
    if missing or unexpected or different:
        raise ModelMismatchError(path, missing, unexpected, different)
