"""A file's bytes, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packlight.units import format_bytes


@dataclass(frozen=True)
class TensorReport:
    """What one tensor takes.

    Attributes:
        name, dtype, shape: of the tensor.
        num_elements, num_nonzeros: how many it has, and how many of them are not zero; the latter
            is None for tensors that are stored as bytes.
        num_values: distinct ones other than zero; None likewise.
        dense_bytes: in memory.
        file_bytes: in the file, its table of values included; None where the file was only looked
            at, which does not tell. Whole words of the coder are counted where they are begun, so a
            tensor's number may be off by four, the sum is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_elements: int
    num_nonzeros: int | None
    num_values: int | None
    dense_bytes: int
    file_bytes: int | None = None


@dataclass(frozen=True)
class FileReport:
    """What a file takes.

    Attributes:
        file_bytes: of the whole file.
        dense_bytes: of all tensors in memory; tied ones count once.
        frame_bytes: of the file, what belongs to no tensor: header, lengths, checksum.
        coding: "range" or "huffman".
        tensors: one report each.
        meta: what was saved beside the tensors.
    """

    file_bytes: int
    dense_bytes: int
    frame_bytes: int | None
    coding: str
    tensors: tuple[TensorReport, ...]
    meta: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Dense bytes over the file's."""
        return self.dense_bytes / self.file_bytes

    def describe(self) -> str:
        """Return the report as lines of text."""
        lines = [
            f"{self.file_bytes} bytes, {self.ratio:.1f}x smaller than {self.dense_bytes} "
            f"({format_bytes(self.dense_bytes)}); {self.coding} coding"
        ]
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        for tensor in self.tensors:
            words = [f"  {tensor.name:{width}}  {tensor.num_elements} x {tensor.dtype}"]
            if tensor.num_nonzeros is not None:
                words.append(f"{tensor.num_nonzeros} not zero, {tensor.num_values} values")
            if tensor.file_bytes is not None:
                bits = 8 * tensor.file_bytes / max(1, tensor.num_elements)
                words.append(f"{tensor.file_bytes} bytes ({bits:.2f} bits each)")
            lines.append(", ".join(words))
        if self.frame_bytes is not None:
            lines.append(f"  header, lengths, checksum: {self.frame_bytes} bytes")
        lines += [f"  {name}: {value}" for name, value in self.meta.items()]
        return "\n".join(lines)
