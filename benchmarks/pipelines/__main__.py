"""Bytes and seconds a step of pipelines on two ranks, beside torch.distributed.pipelining.

    python -m benchmarks.pipelines              # into results.jsonl and the table of README.md
    python -m benchmarks.pipelines --rounds 1 --steps 3

Modes take turns, each with a model, an optimizer and steps of its own, in the same processes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import (
    KEEP_FREED_MEMORY,
    append_line,
    mebibytes,
    provenance,
    read_lines,
    replace_between_markers,
    table,
)
from benchmarks.pipelines.modes import MODES, Trained, train

MODULE = "benchmarks.pipelines"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
# Whose seconds the others' are told in.
BASE = "torch 1F1B"


@dataclass
class Record:
    """One turn of one mode.

    Attributes:
        mode: its name.
        round: which turn, from 0.
        peak_bytes: of each rank.
        predicted_bytes: of each rank, by Packlight.
        predicted_seconds, bubble: by Packlight.
        step_seconds: median over the timed steps, of rank 0.
        loss: at the end.
        provenance: where, when and with what.
    """

    mode: str
    round: int
    peak_bytes: list[int]
    predicted_bytes: list[int | None]
    predicted_seconds: float | None
    bubble: float | None
    step_seconds: float
    loss: float
    provenance: dict[str, Any] = field(default_factory=dict)


def take_turns(
    rank: int, arguments: argparse.Namespace, folder: str, told: dict[str, Any], first: int
) -> None:
    """Have all modes take their turns in this process, one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks
    )
    without_budget: dict[str, int] = {}
    for turn in range(first, first + arguments.rounds):
        for mode in MODES:
            trained = train(mode, arguments.steps, without_budget)
            everybody: list[Any] = [None] * arguments.ranks
            dist.all_gather_object(everybody, trained)
            if rank == 0:
                record = _record(mode.name, turn, everybody)
                record.provenance = told
                append_line(arguments.out, record)
                peaks = ", ".join(map(mebibytes, record.peak_bytes))
                print(f"{mode.name}: {peaks} MiB, {record.step_seconds:.3f} s", file=sys.stderr)
            del trained
            gc.collect()
    dist.destroy_process_group()


def _record(name: str, turn: int, everybody: Sequence[Trained]) -> Record:
    first = everybody[0]
    return Record(
        name, turn, [each.peak_bytes for each in everybody],
        [each.predicted_bytes for each in everybody], first.predicted_seconds, first.bubble,
        statistics.median(first.seconds), max(each.loss for each in everybody),
    )


def report(records: Sequence[Record]) -> list[str]:
    """Return one row a mode; seconds are ratios of turns of the same round."""
    if not records:
        return ["nothing was measured"]
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
            f"{statistics.median(ratios):.2f}" if ratios else "",
            f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "",
            f"{statistics.median(predicted):.2f}" if predicted else "",
            "" if mine[-1].bubble is None else f"{mine[-1].bubble:.0%}", f"{mine[-1].loss:.4f}",
        ])
    told_of = records[-1].provenance
    return [
        *table(
            ["", "peaks of ranks, MiB", "predicted", f"seconds of {BASE}'s", "least to most",
             "predicted seconds of measured", "simulated bubble", "loss"], rows,
        ),
        "",
        f"{len(base)} rounds on {told_of['cores']} cores ({told_of['hardware']}), torch "
        f"{told_of['versions']['torch']}, load {told_of['load_at_start']} at the start; "
        f"`{told_of['command']}`.",
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
