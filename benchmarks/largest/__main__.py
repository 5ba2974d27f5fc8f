"""Finds the greatest depth for every tool and limit, one trial at a time, and appends JSON lines.

    python -m benchmarks.largest
    python -m benchmarks.largest --quick --limits 1GiB --tools "plain PyTorch"

Trials whose lines are in the file already are not run again, so an interrupted run goes on where it
stopped; `--fresh` forgets the lines of the tools and limits named. It takes hours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.common import ROOT, provenance, write_lines
from benchmarks.largest.records import (
    FOLDER,
    QUICK_RESULTS,
    RESULTS,
    Record,
    append_record,
    found,
    read_records,
)
from benchmarks.largest.search import extrapolated, greatest
from benchmarks.largest.tools import TOOLS, WIDTH
from benchmarks.largest.trial import FAILED, TRAINED, Trial, num_parameters, run_trial
from packlight.units import format_bytes, parse_bytes

MODULE = "benchmarks.largest"
LIMITS = ("2GiB", "4GiB", "8GiB")
TIME_LIMIT_SECONDS = 1200.0
QUICK_WIDTH = 192
LARGEST = 2000
# What interpreter and libraries hold, to guess where to begin.
USUAL_HELD_BYTES = 400 * 2**20


def main() -> int:
    """Run the benchmark; 1 if a tool failed for another reason than memory."""
    arguments = _parser().parse_args()
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    width = QUICK_WIDTH if arguments.quick else WIDTH
    limits = [parse_bytes(limit) for limit in arguments.limits]
    if out.exists():
        known = read_records(out)
        again = [
            r for r in known
            if r.tool in arguments.tools and r.limit_bytes in limits and r.width == width
            and (arguments.fresh or r.result.outcome == FAILED)
        ]
        write_lines(out, [r for r in known if r not in again])
    console = Console(stderr=True)
    num_failed = 0
    for limit_bytes in limits:
        for tool in arguments.tools:
            search = _Search(tool, width, limit_bytes, out, arguments, console)
            depth = search.run()
            console.print(
                f"{format_bytes(limit_bytes)}, {tool}: {depth} blocks"
                + (f"; {search.error}" if search.error else ""), highlight=False,
            )
            num_failed += search.error is not None
    return 1 if num_failed else 0


class _Search:
    """The trials of one tool within one limit."""

    def __init__(
        self, tool: str, width: int, limit_bytes: int, out: Path, arguments: argparse.Namespace,
        console: Console,
    ) -> None:
        self.tool, self.width, self.limit_bytes, self.out = tool, width, limit_bytes, out
        self.arguments, self.console = arguments, console
        everything = [r for r in read_records(out) if (r.tool, r.width) == (tool, width)]
        self.records = [r for r in everything if r.limit_bytes == limit_bytes]
        smaller = [r for r in everything if r.limit_bytes < limit_bytes]
        self.guess = self._guess(smaller)
        self.error: str | None = None

    def run(self) -> int:
        """Return the greatest depth."""
        return greatest(self._works, self.guess, LARGEST)

    def _works(self, depth: int) -> bool:
        if self.error is not None:
            return False
        known = [r.result for r in self.records if r.result.depth == depth]
        if not known:
            known = [self._tried(depth)]
        trial = known[-1]
        if trial.outcome == FAILED:
            self.error = trial.error or "failed"
        return trial.outcome == TRAINED

    def _tried(self, depth: int) -> Trial:
        arguments = self.arguments
        cache = ROOT / ".cache" / "largest"
        trial = run_trial(
            self.tool, depth, self.limit_bytes, arguments.seconds, arguments.directory,
            self.width, cache,
        )
        command = (
            f'python -m {MODULE} --limits {self.limit_bytes} --tools "{self.tool}" '
            f"--seconds {arguments.seconds:g}" + " --quick" * arguments.quick
        )
        record = Record(
            self.tool, self.width, self.limit_bytes, arguments.seconds, vars(trial),
            provenance(0, "cpu", command),
        )
        append_record(self.out, record)
        self.records.append(record)
        self.console.print(
            f"  {format_bytes(self.limit_bytes)}, {self.tool}, {depth} blocks: {trial.outcome} "
            f"({trial.seconds:.0f} s)", highlight=False,
        )
        return trial

    def _guess(self, smaller: list[Record]) -> int:
        """Return where to begin: by what smaller limits held, else by bytes for a parameter."""
        base, block = num_parameters(0, self.width), num_parameters(1, self.width)
        block -= base
        known = [
            (limit, held)
            for limit in sorted({r.limit_bytes for r in smaller})
            if (held := found([r for r in smaller if r.limit_bytes == limit]).depth)
        ]
        if len(known) > 1:
            depth = extrapolated(known, self.limit_bytes)
        else:
            per_parameter = TOOLS[self.tool].bytes_per_parameter
            for limit_bytes, held in known:
                per_parameter = (limit_bytes - USUAL_HELD_BYTES) / (base + held * block)
            spare = self.limit_bytes - USUAL_HELD_BYTES
            depth = int((spare / per_parameter - base) / block)
        return max(1, min(LARGEST, depth))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"width {QUICK_WIDTH} for {WIDTH}")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--limits", nargs="+", default=list(LIMITS), metavar="SIZE")
    parser.add_argument(
        "--seconds", type=float, default=TIME_LIMIT_SECONDS, help="for one trial (%(default)s)"
    )
    parser.add_argument("--directory", type=Path, help="for what is offloaded; on a disk")
    parser.add_argument("--fresh", action="store_true", help="try again what is there already")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(FOLDER.parent)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
