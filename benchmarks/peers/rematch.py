"""Times close duels again, the rival and Packlight in the same rounds, and appends JSON lines.

    python -m benchmarks.peers.rematch
    python -m benchmarks.peers.rematch --models vit --rounds 9

The benchmark times at most five cells together, each beside eager steps. Cells of different groups
are compared by their ratios to eager, and a machine that drifts within a group moves those. So,
whoever won: where the two are within a tenth of each other, or the rival is ahead, this decides.
By the same drift another cell than the best may have looked like Packlight's fastest, so the one
that the planner expects to be is timed as well.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import by_model
from benchmarks.common import append_line, quartiles, root_cause, run_apart
from benchmarks.peers.cases import CASES
from benchmarks.peers.duels import Duel, duels_of, rematch_key
from benchmarks.peers.measure import CELLS_TOGETHER, Bench
from benchmarks.peers.records import (
    QUICK_REMATCHES,
    QUICK_RESULTS,
    REMATCHES,
    RESULTS,
    Record,
    Rematch,
    read_rematches,
)
from benchmarks.peers.rivals import rivals_of
from benchmarks.workbench import Step, Workbench

MODULE = "benchmarks.peers.rematch"
NUM_ROUNDS = 5

Timed = Callable[[], float]
"""Runs a step; returns how many seconds it took."""


def main() -> int:
    """Run the rematches; 1 if those of a model could not be run."""
    arguments = by_model.parser(MODULE, __doc__, CASES, REMATCHES).parse_args()
    if arguments.measure_one:
        _measure_one(arguments)
        return 0
    out = arguments.out or (QUICK_REMATCHES if arguments.quick else REMATCHES)
    return min(1, by_model.measure_all(
        MODULE, arguments, out, read_rematches, lambda _, options: run_apart(MODULE, options)
    ))


def _measure_one(arguments: argparse.Namespace) -> None:
    results = QUICK_RESULTS if arguments.quick else RESULTS
    with by_model.progress() as progress, tempfile.TemporaryDirectory() as directory:
        bench = Bench(
            CASES[arguments.measure_one], results, arguments.quick, 0, arguments.device,
            arguments.seed, arguments.command, progress, Path(directory),
        )
        Rematches(bench, arguments.out, arguments.rounds or NUM_ROUNDS).run()


class Rematches:
    """One model's close duels, side by side.

    Args:
        bench: of the model; knows what was measured.
        out: where lines are appended; what it holds is not timed again.
        num_rounds: how often each pair is timed.
    """

    def __init__(self, bench: Bench, out: Path, num_rounds: int) -> None:
        self.bench, self.out, self.num_rounds = bench, out, num_rounds
        self.rivals = {
            (r.tool, r.setting): r for r in rivals_of(bench.case, bench.quick, bench.built)
        }
        self.shuffler = random.Random(bench.seed)

    def run(self) -> None:
        """Time the close duels whose lines are lacking, those with one cell of ours together."""
        known = {r.key for r in read_rematches(self.out)}
        close: dict[str, list[tuple[Record, Record]]] = {}
        for duel in duels_of(list(self.bench.done.values())):
            for ours in _contenders(duel) if duel.is_close else []:
                if rematch_key(duel.rival, ours) not in known:
                    close.setdefault(ours.name, []).append((duel.rival, ours))
        for pairs in close.values():
            for first in range(0, len(pairs), CELLS_TOGETHER):
                together = pairs[first : first + CELLS_TOGETHER]
                self._time(together[0][1], [rival for rival, _ in together])

    def _time(self, ours: Record, rivals: list[Record]) -> None:
        """Time a cell of Packlight's and rivals: in each round it goes first and last."""
        my_step = self._warmed(ours.name, lambda: self.bench.prepared_ours(ours))
        waiting: list[tuple[Rematch, Timed]] = []
        for rival in rivals:
            rematch = Rematch(*rematch_key(rival, ours), provenance=self.bench.provenance)
            prepare = partial(self.bench.prepared_rival, self.rivals[rival.key])
            try:
                waiting.append((rematch, self._warmed(rival.name, prepare)))
            except Exception as error:  # a failure is a result too
                rematch.error = root_cause(error)
                append_line(self.out, rematch)
        rounds: list[tuple[float, dict[str, float], float]] = []
        for round_index in range(self.num_rounds):
            self.bench.say(f"round {round_index + 1} with {ours.name}")
            before = my_step()
            order = self.shuffler.sample(waiting, len(waiting))
            took = {rematch.rival: step() for rematch, step in order}
            rounds.append((before, took, my_step()))
        for rematch, _ in waiting:
            found = [(first + last) / 2 / took[rematch.rival] for first, took, last in rounds]
            rematch.num_rounds = len(found)
            rematch.ratio_median, rematch.ratio_quartiles = median(found), quartiles(found)
            rematch.seconds_median = median(t for first, _, last in rounds for t in (first, last))
            rematch.rival_seconds_median = median(took[rematch.rival] for _, took, _ in rounds)
            append_line(self.out, rematch)
        torch._dynamo.reset()  # what was compiled for these holds their programs
        gc.collect()

    def _warmed(self, name: str, prepare: Callable[[], tuple[Workbench, Step]]) -> Timed:
        """Return what times a step that has run once and made its optimizer state."""
        self.bench.say(f"preparing {name}")
        bench, step = prepare()
        bench.begin(is_first=True)
        step(bench.built.batch)
        return partial(bench.timed_step, step)


def _contenders(duel: Duel) -> list[Record]:
    """Return the cell that was fastest and the one that should be, if they are two."""
    ours, planned = duel.ours, duel.planned
    assert ours is not None
    if planned is None or planned.way_digest == ours.way_digest:
        return [ours]
    return [ours, planned]


if __name__ == "__main__":
    sys.exit(main())
