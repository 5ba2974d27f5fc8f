"""Ranks that are killed at a random moment: how the others end, and what a checkpoint is then."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import packlight
from benchmarks.common import append_line
from packlight.errors import PacklightError
from packlight.run.distributed import load_distributed
from tests.rank_pool import RankPool, mesh, part

# Until the others have to have ended.
TIMEOUT_SECONDS = 60.0
MOST_SECONDS = 3.0
PIECES = (None, "state", "gradient", "parameter")
WIDE, CLASSES = 64, 8


@dataclass
class Kill:
    """What became of one group of ranks.

    Attributes:
        seed: of what was random.
        how: number of ranks, and what of parameters lay in pieces.
        num_ended: ranks that ended by themselves.
        num_hung: ... that did not.
        num_unnamed: ... that ended with another error than `RankError`.
        texts: what they said.
        is_whole: whether a checkpoint loads.
        seconds: until all had ended, from the kill on.
        num_steps: that the others had trained.
        provenance: where, when and with what.
    """

    seed: int
    how: str
    num_ended: int
    num_hung: int
    num_unnamed: int
    texts: list[str]
    is_whole: bool
    seconds: float
    num_steps: int
    provenance: dict[str, Any] = field(default_factory=dict)


def run(
    seeds: Iterable[int], out: Path, told: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Kill one rank for each seed, and add a line."""
    for seed in seeds:
        folder = Path(tempfile.mkdtemp())
        try:
            kill = killed(seed, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        kill.provenance = told
        append_line(out, kill)
        say(f"{seed}: {kill.how}, {kill.seconds:.1f} s, hung {kill.num_hung}, unnamed "
            f"{kill.num_unnamed}, whole {kill.is_whole}, {kill.num_steps} steps")


def killed(seed: int, folder: Path) -> Kill:
    """Have ranks train and save, kill one of them, and see how the others end.

    Args:
        seed: of how many there are, what they do, who is killed and when.
        folder: an empty one.
    """
    generator = random.Random(seed)
    size, pieces = generator.choice((2, 3)), generator.choice(PIECES)
    victim, directory = generator.randrange(size), folder / "saved"
    directory.mkdir()
    pool = RankPool(size, folder)
    texts, num_hung, num_unnamed, num_steps = [], 0, 0, 0
    try:
        for pipe in pool.pipes:
            pipe.send((trained_until_it_ends, (pieces, str(directory))))
        while not (directory / "started").exists():
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, MOST_SECONDS))
        begin = time.monotonic()
        pool.processes[victim].kill()
        for rank, pipe in enumerate(pool.pipes):
            if rank == victim:
                continue
            left = max(0.0, begin + TIMEOUT_SECONDS - time.monotonic())
            if not pipe.poll(left):
                num_hung += 1
                continue
            kind, text, num_steps = pipe.recv()
            texts.append(f"{kind}: {text}")
            num_unnamed += kind != "RankError"
        seconds = time.monotonic() - begin
    finally:
        pool.close()
    return Kill(
        seed, f"{size}, {pieces or 'whole'}", len(texts), num_hung, num_unnamed, texts,
        _is_whole(directory), seconds, num_steps,
    )


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained_until_it_ends(pieces: str | None, directory: str) -> tuple[str, str, int]:
    """Train, save and plan for other shapes in turn, until another rank is gone.

    Args:
        pieces: what of parameters lies in pieces, None for nothing.
        directory: for checkpoints.

    Returns:
        What kind of error it ended with, its first line, and after how many steps.
    """
    model, optimizer = made()
    parallel = packlight.Parallel(data="data")
    if pieces is not None:
        parallel = packlight.Parallel(shard="data", pieces=pieces)
    rows, done = 12, 0

    def batch() -> Any:
        return part((torch.randn(rows, WIDE), torch.randint(CLASSES, (rows,))))

    step = packlight.fit(
        model, loss_of, optimizer, batch(), mesh=mesh(), parallel=parallel, progress=False
    )
    step.save(Path(directory) / "checkpoint", done)
    (Path(directory) / "started").touch()
    while True:
        try:
            step(batch())
            done += 1
            step.save(Path(directory) / "checkpoint", done)
            rows = rows + 6 if done % 8 == 0 else rows
        except PacklightError as error:
            return type(error).__name__, str(error).partition("\n")[0], done
        except Exception as error:
            return f"{type(error).__module__}.{type(error).__name__}", str(error)[:200], done


def _is_whole(directory: Path) -> bool:
    model, optimizer = made()
    whole = directory / "checkpoint"
    if not whole.exists():  # killed between two renames: the one before is there, whole
        whole = directory / ".checkpoint.old"
    try:
        return bool(load_distributed(whole, model, optimizer) >= 0)
    except Exception:
        return False
