"""Bytes and seconds a step of pipelines on two ranks, beside torch.distributed.pipelining.

    python -m benchmarks.pipelines              # into results.jsonl and the table of README.md
    python -m benchmarks.pipelines --rounds 1 --steps 3

Modes take turns, each with a model, an optimizer and steps of its own, in the same processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.multiprocessing as mp

from benchmarks.common import (
    KEEP_FREED_MEMORY,
    mebibytes,
    provenance,
    read_lines,
    replace_between_markers,
    table,
)
from benchmarks.pipelines.turns import Record, take_turns

MODULE = "benchmarks.pipelines"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
# Whose seconds the others' are told in.
BASE = "torch 1F1B"


def report(records: Sequence[Record]) -> list[str]:
    """Return one row a mode; seconds are ratios of turns of the same round.

    They are left out where the machine had other work than its cores can do.
    """
    if not records:
        return ["nothing was measured"]
    told_of = records[-1].provenance
    is_busy = told_of["load_at_start"] > told_of["cores"]
    base = {r.round: r.step_seconds for r in records if r.mode == BASE}
    rows = []
    for mode in dict.fromkeys(record.mode for record in records):
        mine = [record for record in records if record.mode == mode]
        ratios = [r.step_seconds / base[r.round] for r in mine if r.round in base]
        peaks = [max(r.peak_bytes[k] for r in mine) for k in range(len(mine[0].peak_bytes))]
        told = mine[-1].predicted_bytes
        predicted = [
            r.predicted_seconds / r.step_seconds for r in mine if r.predicted_seconds is not None
        ]
        rows.append([
            mode, " ".join(map(mebibytes, peaks)),
            " ".join(mebibytes(size) for size in told if size is not None),
            *(["", "", ""] if is_busy or not ratios else [
                f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{statistics.median(predicted):.2f}" if predicted else "",
            ]),
            "" if mine[-1].bubble is None else f"{mine[-1].bubble:.0%}", f"{mine[-1].loss:.4f}",
        ])
    return [
        *table(
            ["", "peaks of ranks, MiB", "predicted", f"seconds of {BASE}'s", "least to most",
             "predicted seconds of measured", "simulated bubble", "loss"], rows,
        ),
        "",
        f"Rounds: {len(base)}, on {told_of['cores']} cores ({told_of['hardware']}), torch "
        f"{told_of['versions']['torch']}, load {told_of['load_at_start']} at the start; "
        f"`{told_of['command']}`." + (" Times are left out: the machine had other work." * is_busy),
    ]


def main() -> int:
    """Run the benchmark."""
    arguments = _parser().parse_args()
    os.environ.update(KEEP_FREED_MEMORY)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
    if arguments.fresh and arguments.out.exists():
        arguments.out.unlink()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PACKLIGHT_CACHE"] = str(arguments.cache or folder)
        context = mp.get_context("spawn")
        first = 1 + max((record.round for record in read_lines(arguments.out, Record)), default=-1)
        ranks = [
            context.Process(target=take_turns, args=(rank, arguments, folder, told, first))
            for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    lines = report(read_lines(arguments.out, Record))
    if arguments.out == RESULTS:
        replace_between_markers(FOLDER / "README.md", "pipelines", lines)
    else:
        print("\n".join(lines))
    return max(process.exitcode or 0 for process in ranks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed in each turn")
    parser.add_argument("--cache", type=Path, help="of Packlight's; by default an empty one")
    parser.add_argument("--fresh", action="store_true", help="forget what the file has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
