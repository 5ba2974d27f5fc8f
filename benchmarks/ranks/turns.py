"""What one rank does: each mode's turn, round after round, into lines."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks.common import append_line
from benchmarks.ranks.modes import MODES, Mode, Trained, train


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


def take_turns(
    rank: int, arguments: argparse.Namespace, folder: str, told: dict[str, Any], first: int
) -> None:
    """Have all modes take their turns in this process, one of the ranks.

    Args:
        rank: which.
        arguments: of the command line.
        folder: where ranks find one another.
        told: where and with what records are made.
        first: number of the first round.
    """
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
