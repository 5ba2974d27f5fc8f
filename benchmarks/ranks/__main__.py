"""Bytes and seconds a step on two ranks, beside DistributedDataParallel and FSDP2.

    python -m benchmarks.ranks              # into results.jsonl and the tables of README.md
    python -m benchmarks.ranks --rounds 1 --steps 3
    python -m benchmarks.ranks parity       # strategies beside one process: parity.jsonl
    python -m benchmarks.ranks kills --count 100        # ranks that die: kills.jsonl
    python -m benchmarks.ranks plans        # 512 ranks planned on this machine: plans.jsonl

Modes take turns, each with a model, an optimizer and steps of its own, in the same processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing as mp

from benchmarks.common import KEEP_FREED_MEMORY, provenance, read_lines, replace_between_markers
from benchmarks.ranks.modes import MODES
from benchmarks.ranks.report import report
from benchmarks.ranks.tables import kills_table, parity_table, plans_table
from benchmarks.ranks.turns import Record, take_turns

MODULE = "benchmarks.ranks"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"


def main() -> int:
    """Run the benchmark."""
    others = {"parity": parity_table, "kills": kills_table, "plans": plans_table}
    if sys.argv[1:] and sys.argv[1] in others:
        return others[sys.argv[1]](sys.argv[2:])
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
            context.Process(target=take_turns, args=(rank, arguments, folder, told, first))
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
