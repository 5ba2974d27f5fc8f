"""Peaks and halo bytes of eager steps whose samples are cut over 1, 2 and 4 ranks.

    python -m benchmarks.convolutions       # into results.jsonl and the table of README.md

Halo bytes are counted where they are handed to the network, and computed from the table that
`SplitModel.describe` prints: rows that come from others times what a row takes, forward and back
(but for the sample's own, which needs no gradient).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing as mp

from benchmarks.common import (
    mebibytes,
    provenance,
    read_lines,
    replace_between_markers,
    table,
)
from benchmarks.convolutions.measured import Record, measure_rank

MODULE = "benchmarks.convolutions"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="timed ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
    arguments.out.unlink(missing_ok=True)
    for num_ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            given = num_ranks, folder, arguments.steps, arguments.out, told
            mp.spawn(measure_rank, given, num_ranks)
    lines = report(read_lines(arguments.out, Record))
    replace_between_markers(FOLDER / "README.md", "convolutions", lines)
    return 0


def report(records: list[Record]) -> list[str]:
    """Return the table."""
    alone = {record.model: record for record in records if record.num_ranks == 1}
    rows = [
        [
            record.model, str(record.num_ranks), mebibytes(record.peak_bytes),
            f"{alone[record.model].peak_bytes / record.num_ranks / record.peak_bytes:.2f}",
            f"{record.halo_bytes / 2**10:.1f}", f"{record.formula_bytes / 2**10:.1f}",
            f"{abs(record.loss - alone[record.model].loss):.1e}",
        ]
        for record in records
    ]
    header = [
        "model", "ranks", "peak per rank, MiB", "of linear", "halos, KiB", "formula, KiB",
        "loss's difference",
    ]
    return table(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
