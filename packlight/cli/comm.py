"""`packlight train FILE --workers 4 --comm topk:0.01+q2 --local-steps 30`: over slow networks.

Each worker plans and runs its own step, within its own budget; after every so many steps workers
average what theirs have changed, compressed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from packlight.cli import options
from packlight.errors import OptionError
from packlight.units import format_bytes

if TYPE_CHECKING:
    from torch import nn

    from packlight.comm import LocalSteps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --workers, --comm and --local-steps."""
    parser.add_argument(
        "--workers", metavar="N", type=options.positive_int,
        help="start so many processes on this machine; on several, use torchrun",
    )
    parser.add_argument(
        "--comm", metavar="METHOD",
        help="average compressed changes in place of gradients: topk:0.01+q2, q4, powersgd:2, ...",
    )
    parser.add_argument(
        "--local-steps", metavar="N", type=options.positive_int,
        help="with --comm: steps between two averages (default: 1)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together, before the long work.

    Raises:
        OptionError: it says which.
    """
    if arguments.workers == 1:
        raise OptionError("--workers 1 is this process\nhint: 2 or more, or no --workers")
    if arguments.comm is None:
        if arguments.local_steps is not None:
            raise OptionError(
                "--local-steps says how often changes are averaged, which needs --comm\n"
                "hint: --comm fp32"
            )
        return
    from packlight.comm.parse import compressor_of

    compressor_of(arguments.comm)
    if arguments.checkpoint is not None:
        raise OptionError(
            "--checkpoint with --comm: what workers have not sent is in no checkpoint of the "
            "command line\nhint: a script with packlight.comm.diloco and its state_dict() resumes "
            "to the last bit"
        )
    if arguments.workers is None and not _is_worker():
        raise OptionError(
            "--comm, and there is nobody to talk to\n"
            "hint: --workers 2, or torchrun --nproc-per-node 2 -m packlight train ..."
        )


def _is_worker() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def has_workers_to_start(arguments: argparse.Namespace) -> bool:
    """Whether this process is to start others, and not to train."""
    return arguments.workers is not None and not _is_worker()


def run_workers(arguments: argparse.Namespace) -> int:
    """Run this very command in as many processes and return the exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={arguments.workers}", "-m", "packlight", *arguments.command_line,
    ]
    return subprocess.run(command).returncode


def local_steps(arguments: argparse.Namespace, model: nn.Module) -> LocalSteps | None:
    """Return what averages changes, None without --comm."""
    if arguments.comm is None:
        return None
    from packlight.comm import LocalSteps, Schedule

    return LocalSteps(model, Schedule(every=arguments.local_steps or 1), arguments.comm)


def sent_text(local: LocalSteps) -> str:
    """Return how much this worker has sent."""
    sent = local.transport.sent_bytes
    return f"{format_bytes(sent)} sent by each worker, {sent / local.num_steps:,.0f} bytes a step"
