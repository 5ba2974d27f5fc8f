"""The command line of benchmarks that measure every model in a process of its own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.common import ROOT, write_lines

GOES_ON = """
A cell whose line is in the file already is left as it is, unless it failed, so an interrupted run
goes on where it stopped; `--fresh` forgets the lines of the models named and measures them again.
"""

Read = Callable[[Path], list[Any]]
"""File -> records, each with `model` and `has_failed`."""


def parser(
    module: str, about: str, models: Iterable[str], results: Path
) -> argparse.ArgumentParser:
    """Return a parser with the options that all of them take; `out` is None for the default."""
    names = list(models)
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=about + GOES_ON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="small sizes, few budgets, two rounds")
    made.add_argument("--models", nargs="+", choices=names, default=names)
    made.add_argument("--rounds", type=int, help="default: by model, 2 to 5")
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--out", type=Path, help=f"default: {results.relative_to(ROOT)}")
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--measure-one", choices=names, help=argparse.SUPPRESS)
    made.add_argument("--command", default="", help=argparse.SUPPRESS)
    return made


def measure_all(
    module: str, arguments: argparse.Namespace, out: Path, read: Read,
    measure_apart: Callable[[str, list[str]], bool],
) -> int:
    """Measure the models asked for, one after the other; return how many failed.

    Args:
        module: that is run.
        arguments: from the parser.
        out: where lines are appended.
        read: reads them.
        measure_apart: model, options of its process -> whether that succeeded.
    """
    if out.exists():  # what failed is tried again
        kept = [
            r for r in read(out)
            if r.model not in arguments.models or not (arguments.fresh or r.has_failed)
        ]
        write_lines(out, kept)
    console = Console(stderr=True)
    num_failed = 0
    for name in arguments.models:
        num_before = len(read(out))
        begin = time.perf_counter()
        options = [
            "--measure-one", name, "--out", str(out), "--device", arguments.device,
            "--seed", str(arguments.seed), "--command", command(module),
        ]
        options += ["--quick"] if arguments.quick else []
        options += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
        is_done = measure_apart(name, options)
        console.print(
            f"{name}: {len(read(out)) - num_before} lines added to {out} in "
            f"{time.perf_counter() - begin:.0f} s" + ("" if is_done else "; it failed, see above"),
            style=None if is_done else "red", highlight=False,
        )
        num_failed += not is_done
    return num_failed


def command(module: str) -> str:
    """Return what the user typed."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])


@contextmanager
def progress() -> Iterator[Progress]:
    """Show what is being measured."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield shown
