"""Bytes and seconds a step on two ranks, beside DistributedDataParallel and FSDP2.

    python -m benchmarks.ranks              # into results.jsonl and the tables of README.md
    python -m benchmarks.ranks --rounds 1 --steps 3

Modes take turns, each with a model, an optimizer and steps of its own, in the same processes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from benchmarks.common import (
    KEEP_FREED_MEMORY,
    append_line,
    provenance,
    read_lines,
    replace_between_markers,
)
from benchmarks.ranks.modes import MODES, Mode, Trained, train
from benchmarks.ranks.report import report

MODULE = "benchmarks.ranks"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"


@dataclass
class Record:
    """One turn of one mode.

    Attributes:
        mode: its name.
        round: which turn, from 0.
        budget_mebibytes: of Packlight's; None for none.
        peak_bytes: of the rank with most.
        predicted_bytes, predicted_seconds: by Packlight.
        step_seconds: median over the timed steps, of rank 0.
        loss: at the end, the mean of the ranks'.
        num_equal, num_parameters: parameters with DDP's bits at the end, of how many.
        provenance: where, when and with what.
    """

    mode: str
    round: int
    budget_mebibytes: int | None
    peak_bytes: int
    predicted_bytes: int | None
    predicted_seconds: float | None
    step_seconds: float
    loss: float
    num_equal: int
    num_parameters: int
    provenance: dict[str, Any] = field(default_factory=dict)


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
        # Turns are added to those that the file has.
        first = 1 + max((record.round for record in read_lines(arguments.out, Record)), default=-1)
        ranks = [
            context.Process(target=_rank, args=(rank, arguments, folder, told, first))
            for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    lines = report(read_lines(arguments.out, Record))
    if arguments.out == RESULTS:
        replace_between_markers(FOLDER / "README.md", "ranks", lines)
    else:
        print("\n".join(lines))
    return max(process.exitcode or 0 for process in ranks)


def _rank(
    rank: int, arguments: argparse.Namespace, folder: str, told: dict[str, Any], first: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks
    )
    console = Console(stderr=True, quiet=rank > 0)
    modes = [mode for mode in MODES if not arguments.modes or mode.name in arguments.modes]
    for turn in range(first, first + arguments.rounds):
        reference: list[torch.Tensor] = []
        for mode in modes:
            trained = train(mode, arguments.steps, time.perf_counter)
            reference = reference or trained.parameters  # DDP's, which come first
            record = _record(mode, turn, trained, reference)
            record.provenance = told
            if rank == 0:
                append_line(arguments.out, record)
            console.print(f"{mode.name}: {record.peak_bytes / 2**20:.1f} MiB, "
                          f"{record.step_seconds:.3f} s, {record.num_equal} equal")
            del trained
            gc.collect()
    dist.destroy_process_group()


def _record(mode: Mode, turn: int, trained: Trained, reference: list[torch.Tensor]) -> Record:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (trained.peak_bytes, trained.losses[-1]))
    pairs = zip(trained.parameters, reference, strict=True)
    return Record(
        mode.name, turn, mode.budget_mebibytes, max(peak for peak, _ in everybody),
        trained.predicted_bytes, trained.predicted_seconds, statistics.median(trained.seconds),
        statistics.fmean(loss for _, loss in everybody),
        sum(torch.equal(one, other) for one, other in pairs), len(reference),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed in each turn")
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in MODES])
    parser.add_argument("--cache", type=Path, help="of Packlight's; by default an empty one")
    parser.add_argument("--fresh", action="store_true", help="forget what the file has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
