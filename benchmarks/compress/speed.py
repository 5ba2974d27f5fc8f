"""How fast are files written and read, beside general compressors on the same codes?

Tensors of AlexNet's and VGG-16's shapes with random places and values at the densities that Deep
Compression keeps there. What is compressed by the others is one byte a weight: its code.
"""

from __future__ import annotations

import argparse
import lzma
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import packlight.compress as compress
from benchmarks.common import (
    append_line,
    provenance,
    read_lines,
    replace_between_markers,
    table,
)

MODULE = "benchmarks.compress.speed"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "speed.jsonl"

# Shape, share of weights kept, values: arXiv 1510.00149, tables 4 and 5.
SHAPES = {
    "alexnet conv2": ((256, 48, 5, 5), 0.38, 255),
    "alexnet fc6": ((4096, 9216), 0.09, 31),
    "vgg16 conv5_3": ((512, 512, 3, 3), 0.36, 255),
    "vgg16 fc6": ((4096, 25088), 0.04, 31),
    "vgg16 fc7": ((4096, 4096), 0.04, 31),
}


@dataclass(frozen=True)
class Record:
    """One tensor through one compressor.

    Attributes:
        tensor, compressor: what through what.
        dense_bytes, file_bytes: as float32, and compressed.
        write_seconds, read_seconds: processor seconds of this process.
        provenance: where, when, with what.
    """

    tensor: str
    compressor: str
    dense_bytes: int
    file_bytes: int
    write_seconds: float
    read_seconds: float
    provenance: dict[str, Any]


def weight(name: str, seed: int = 0) -> torch.Tensor:
    """Return a tensor of that name's shape, density and number of values."""
    shape, density, num_values = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_values, generator=generator).half().float()
    codes = torch.randint(num_values, shape, generator=generator)
    is_weight = torch.rand(shape, generator=generator) < density
    return values[codes] * is_weight


def others() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Return general compressors: how to compress and how to decompress."""
    found: dict[str, Any] = {
        "zlib -9": (lambda b: zlib.compress(b, 9), zlib.decompress),
        "lzma": (lzma.compress, lzma.decompress),
    }
    try:
        import zstandard
    except ImportError:
        print("zstandard is not installed: it is left out", file=sys.stderr)
    else:
        for level in (3, 19):
            packer, unpacker = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
            found[f"zstd -{level}"] = (packer.compress, unpacker.decompress)
    return found


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns and the processor seconds it takes."""
    begin = time.process_time()
    result = function()
    return result, time.process_time() - begin


def measured(name: str, made: dict[str, Any]) -> Iterator[Record]:
    """Yield what each compressor makes of a tensor."""
    tensor = weight(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight.plc"
        for coding in ("range", "huffman"):
            save = partial(compress.save, path, {"w": tensor}, coding=coding)
            report, write_seconds = timed(save)
            loaded, read_seconds = timed(partial(compress.load, path))
            assert torch.equal(loaded["w"], tensor)
            yield Record(
                name, f"packlight, {coding}", tensor.nbytes, report.file_bytes, write_seconds,
                read_seconds, made,
            )  # fmt: skip
    _, codes = torch.unique(tensor, return_inverse=True)
    content = codes.to(torch.uint8).numpy().tobytes()
    for label, (pack, unpack) in others().items():
        packed, write_seconds = timed(partial(pack, content))
        found, read_seconds = timed(partial(unpack, packed))
        assert found == content
        yield Record(name, label, tensor.nbytes, len(packed), write_seconds, read_seconds, made)


def main() -> int:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = provenance(0, "cpu", f"python -m {MODULE} {shlex.join(sys.argv[1:])}",
                      ("constriction", "zstandard"))  # fmt: skip
    for name in arguments.only:
        for record in measured(name, made):
            append_line(arguments.out, record)
    report_speed(read_lines(arguments.out, Record))
    return 0


def report_speed(records: list[Record]) -> None:
    """Write the table into the README."""
    rows = [
        [
            r.tensor, r.compressor, f"{r.dense_bytes / r.file_bytes:.1f}",
            f"{r.dense_bytes / 1e6 / r.write_seconds:.0f}",
            f"{r.dense_bytes / 1e6 / r.read_seconds:.0f}",
        ]
        for r in records
    ]  # fmt: skip
    header = ["tensor", "compressor", "times smaller", "MB/s in", "MB/s out"]
    replace_between_markers(FOLDER / "README.md", "speed", table(header, rows, right_from=2))


if __name__ == "__main__":
    sys.exit(main())
