"""How a run that was interrupted goes on."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


def unused_directory(name: str) -> str:
    """Return a name that no directory has: an older run's checkpoints are not mixed with these."""
    number, candidate = 1, name
    while Path(candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def resume_command(arguments: argparse.Namespace, directory: str) -> str:
    """Return the command line that goes on from a directory's newest checkpoint."""
    words = ["packlight", "train", arguments.file]
    if arguments.budget is not None:
        words += ["--budget", arguments.budget]
    words += ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
    words += ["--device", arguments.device, "--checkpoint", directory]
    words += ["--save-every", str(arguments.save_every)]
    for name in arguments.allow:
        words += ["--allow", name]
    if arguments.shard is not None:
        words += ["--shard", arguments.shard]
    if arguments.offload_directory is not None:
        words += ["--offload-directory", arguments.offload_directory]
    if arguments.exact:
        words.append("--exact")
    return shlex.join(words)
