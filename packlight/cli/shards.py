"""`--shard`: parameters in pieces with all ranks, and their checkpoints, one directory each.

DIR/step-00000100/    written by all ranks together (`TrainStep.save`), for any number of them
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packlight.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --shard."""
    parser.add_argument(
        "--shard", metavar="WHAT", nargs="?", const="parameter",
        help="with several ranks: each updates some rows of every parameter, and keeps no others' "
        "WHAT: state, gradient, parameter or planned (default: parameter)",
    )


def parallel(
    arguments: argparse.Namespace, has_ranks: bool, is_hybrid: bool = False
) -> Any:
    """Return what `fit` is told of it, None without it.

    Raises:
        OptionError: there are no ranks, or no such pieces.
    """
    if arguments.shard is None and not is_hybrid:
        return None
    if not has_ranks:
        raise OptionError(
            "--shard needs ranks to share parameters with\nhint: torchrun --nproc-per-node 2 -m "
            "packlight train, or plan --mesh data=8 --link 25GB/s"
        )
    from packlight.ranks.parallel import Parallel
    from packlight.ranks.pieces import Placement

    if is_hybrid:
        return Parallel("data", "shard", arguments.shard or Placement.PARAMETER.value)
    return Parallel(shard="data", pieces=arguments.shard)


@dataclass(frozen=True)
class PieceCheckpoint:
    """A checkpoint in pieces.

    Attributes:
        path: of its directory.
        step: after which it was written.
    """

    path: Path
    step: int

    @classmethod
    def at(cls, directory: Path, step: int) -> PieceCheckpoint:
        """Return the one of a step, which may be to be written."""
        return cls(directory / f"step-{step:08d}", step)


def newest(directory: str | None) -> PieceCheckpoint | None:
    """Return the latest checkpoint in pieces in a directory, None if there is none."""
    if directory is None or not Path(directory).is_dir():
        return None
    found = [
        PieceCheckpoint(path, int(match[1]))
        for path in Path(directory).iterdir()
        if path.is_dir() and (match := re.fullmatch(r"step-(\d{8})", path.name))
    ]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)
