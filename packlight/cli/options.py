"""Command line options that several commands share, and their checks before the long work."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from packlight.errors import MissingExtraError, OptionError
from packlight.units import parse_bytes


def add_common(parser: argparse.ArgumentParser, *, with_budget: bool) -> None:
    """Add FILE, --allow, --device, --seed and --report, and where wanted what fits a budget."""
    parser.add_argument("file", metavar="FILE", help="Python file with model(), loss(), ...")
    if with_budget:
        parser.add_argument(
            "--budget",
            metavar="BYTES",
            help="for example 300MiB: parameters, gradients, optimizer state, batch, activations "
            "and workspace together (default: no limit)",
        )
        parser.add_argument(
            "--exact",
            action="store_true",
            help="only what keeps every bit: no microbatches, no row chunks",
        )
        parser.add_argument(
            "--fuse",
            action="store_true",
            help="also compile groups of operations to one kernel each, where that is faster; with "
            "--exact, only those that keep every bit",
        )
        parser.add_argument(
            "--offload-directory",
            metavar="DIR",
            help="let activations and optimizer state lie in a file in DIR while nobody needs them",
        )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="allow an approximate technique by name, such as bf16 or fp16 (the loss under "
        "autocast); may be given several times",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page with pictures to DIR")


def mesh(device: str) -> Any:
    """Return the mesh of the ranks that torchrun started, None for a process that is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("data",))


def modelled_mesh(arguments: argparse.Namespace) -> Any:
    """Return the mesh of ranks that a step is planned for and that are not there, if any.

    Raises:
        OptionError: it is none, or the one of --mesh and --link is there without the other.
    """
    if (arguments.mesh is None) is not (arguments.link is None):
        raise OptionError("--mesh and --link belong together\nhint: --mesh data=8 --link 25GB/s")
    if arguments.mesh is None:
        return None
    from packlight.ranks.modelled import ModelledMesh

    return ModelledMesh.parsed(arguments.mesh, arguments.link)


def parsed_budget(arguments: argparse.Namespace) -> int | None:
    """Return the budget in bytes, or None for no limit.

    Raises:
        BudgetFormatError: it is not a number of bytes.
    """
    return None if arguments.budget is None else parse_bytes(arguments.budget)


def moves(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the moves that may be made beside recomputation."""
    from packlight.moves.registry import exact_move_names, move_names

    if arguments.exact:
        return (*exact_move_names(), *(("fuse-exactly",) if arguments.fuse else ()))
    return (*move_names(), *(("fuse",) if arguments.fuse else ()))


def offload_directory(arguments: argparse.Namespace) -> Path | None:
    """Return the directory to offload to, created if needed, or None.

    Raises:
        OptionError: it cannot be created or written to.
    """
    directory = arguments.offload_directory
    return None if directory is None else writable_directory(directory, "--offload-directory")


def allowed(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of approximate techniques that are allowed.

    Raises:
        OptionError: one is unknown, or two exclude each other.
    """
    from packlight.moves.precision import chosen_precision
    from packlight.moves.registry import checked_techniques, technique_names

    allow = checked_techniques(arguments.allow, technique_names())
    chosen_precision(allow)
    return allow


def positive_int(text: str) -> int:
    """Return a positive int, for argparse."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def check_report(directory: str | None) -> Path | None:
    """Return the report directory, created and writable, or None where no report is wanted.

    Called first, so that nobody profiles for a minute to learn that the result cannot be saved.

    Raises:
        OptionError: the directory cannot be created or written to.
        MissingExtraError: reports need matplotlib, which is not installed.
    """
    if directory is None:
        return None
    path = writable_directory(directory, "--report")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "--report") from None
    return path


def writable_directory(directory: str, option: str) -> Path:
    """Return the directory, created if needed.

    Raises:
        OptionError: it cannot be created or written to.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OptionError(f"{option} {directory}: cannot write there: {reason}") from None
    return path
