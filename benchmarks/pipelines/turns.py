"""What one rank does: each pipeline's turn, round after round, into lines."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import append_line, mebibytes
from benchmarks.pipelines.modes import MODES, Trained, train


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
