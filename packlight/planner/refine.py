"""Local moves on a schedule's retention intervals: drop a buffer over a gap, or keep it there.

This handles what a chain of segments cannot see: long skips, shared parameters, gradients that pile up
while activations go away, the loss head. Every move is judged by the peak that it really gives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from packlight.planner.retention import Interval, Retention

EPSILON_SECONDS = 1e-12


@dataclass
class Effort:
    """How much work refinement may do, in evaluations of positions (so that plans are reproducible)."""

    evaluations: int

    def left(self, retention: Retention) -> bool:
        """Whether there is any left."""
        return retention.num_evaluations < self.evaluations


def repair(retention: Retention, budget_bytes: int, effort: Effort, width: int = 6) -> bool:
    """Drop buffers where the peak is above the budget until it is not; return whether that worked.

    At the highest position, the drops that promise most bytes per second are tried, and the one with
    the best measured ratio of bytes above the budget removed to seconds added is taken.
    """
    tabu: set[tuple[int, int]] = set()
    while True:
        peaks = retention.peaks
        worst = int(np.argmax(peaks))
        if peaks[worst] <= budget_bytes:
            return True
        if not effort.left(retention):
            return False
        candidates = _drop_candidates(retention, worst, tabu)
        before = _excess(retention, budget_bytes)
        seconds = retention.total_extra_seconds
        best: tuple[float, int, list[Interval]] | None = None
        for buffer, new in candidates[:width]:
            old = list(retention.intervals[buffer])
            if retention.set_intervals(buffer, new):
                gain = before - _excess(retention, budget_bytes)
                cost = retention.total_extra_seconds - seconds
                if gain > 0 and int(retention.peaks[worst]) < int(peaks[worst]):
                    score = gain / (cost + 1e-9)
                    if best is None or score > best[0]:
                        best = (score, buffer, new)
            retention.set_intervals(buffer, old)
        if best is None:
            tried = {(buffer, worst) for buffer, _ in candidates[:width]}
            if not tried:
                return False
            tabu |= tried
            continue
        retention.set_intervals(best[1], best[2])


def _excess(retention: Retention, budget_bytes: int) -> float:
    over = retention.peaks - budget_bytes
    return float(over[over > 0].sum())


def _drop_candidates(
    retention: Retention, position: int, tabu: set[tuple[int, int]]
) -> list[tuple[int, list[Interval]]]:
    found = []
    needed = retention.used[position]
    for buffer, intervals in enumerate(retention.intervals):
        if retention.is_fixed[buffer] or retention.size[buffer] == 0 or buffer in needed:
            continue
        if (buffer, position) in tabu:
            continue
        if any(start < position < end or (start < position <= end) for start, end in intervals):
            new = retention.without_gap(buffer, position)
            if new is None:
                continue
            seconds = retention.seconds[retention.maker[buffer]]
            found.append((retention.size[buffer] / (seconds + 1e-9), buffer, new))
    found.sort(key=lambda c: (-c[0], c[1]))
    return [(buffer, new) for _, buffer, new in found]


def improve(retention: Retention, budget_bytes: int, effort: Effort) -> None:
    """Keep buffers that are recomputed wherever that fits, the most seconds per byte first."""
    while effort.left(retention):
        changed = False
        for _, index, position in _recomputations(retention):
            if not effort.left(retention):
                return
            if index in retention.lists[position]:
                changed = _try_keep(retention, index, position, budget_bytes) or changed
        if not changed:
            return


def _recomputations(retention: Retention) -> list[tuple[float, int, int]]:
    """Return (score, operation, position) of every recomputation, best to avoid first."""
    found = []
    for index, positions in enumerate(retention.rerun_at):
        size = sum(retention.size[b] for b in retention.creates[index]) + 1
        for position in positions:
            found.append((-retention.seconds[index] / size, index, position))
    found.sort()
    return found


def _try_keep(retention: Retention, index: int, position: int, budget_bytes: int) -> bool:
    """Hold what an operation made until a position, instead of running it again there."""
    seconds = retention.total_extra_seconds
    undo: list[tuple[int, list[Interval]]] = []
    vanished: set[int] = set()
    wanted = [b for b in retention.creates[index] if _is_read_at(retention, b, position)]
    for buffer in wanted:
        filled = retention.with_gap_filled(buffer, position)
        if filled is None:
            continue
        new, latest = filled
        window = retention.peaks[latest + 1 : position]
        if len(window) and int(window.max()) + retention.size[buffer] > budget_bytes:
            break
        undo.append((buffer, list(retention.intervals[buffer])))
        vanished |= retention.used[position]
        if not retention.set_intervals(buffer, new):
            break
    else:
        faster = retention.total_extra_seconds < seconds - EPSILON_SECONDS
        if undo and faster and retention.peak_bytes <= budget_bytes:
            for buffer in vanished:
                retention.trim(buffer)
            return True
    for buffer, old in reversed(undo):
        retention.set_intervals(buffer, old)
    return False


def _is_read_at(retention: Retention, buffer: int, position: int) -> bool:
    if buffer in retention.reads[position] or buffer in retention.starts[position]:
        return True
    return any(buffer in retention.reads[i] for i in retention.lists[position])


def shake(
    retention: Retention, budget_bytes: int, effort: Effort, seed: int = 0, stall: int = 60
) -> None:
    """Drop a few buffers at random, refill greedily, and keep what turned out faster.

    Ruin and recreate (Schrimpf et al. 2000) with a fixed seed; stops after `stall` rounds without gain.
    """
    generator = random.Random(seed)
    best_seconds = retention.total_extra_seconds
    best = retention.copy_state()
    without_gain = 0
    while effort.left(retention) and without_gain < stall and best_seconds > EPSILON_SECONDS:
        held = [
            (buffer, interval)
            for buffer, intervals in enumerate(retention.intervals)
            if not retention.is_fixed[buffer] and retention.size[buffer] > 0
            for interval in intervals
        ]
        if not held:
            return
        for buffer, (start, end) in generator.sample(held, min(len(held), generator.randint(1, 4))):
            new = retention.without_gap(buffer, generator.randint(start + 1, end))
            if new is not None:
                retention.set_intervals(buffer, new)
        feasible = repair(retention, budget_bytes, effort)
        if feasible:
            _improve_shuffled(retention, budget_bytes, effort, generator)
        if feasible and retention.total_extra_seconds < best_seconds - EPSILON_SECONDS:
            best_seconds = retention.total_extra_seconds
            best = retention.copy_state()
            without_gain = 0
        else:
            without_gain += 1
            retention.restore(best)
    retention.restore(best)


def _improve_shuffled(
    retention: Retention, budget_bytes: int, effort: Effort, generator: random.Random
) -> None:
    candidates = [
        (score * generator.uniform(0.5, 1.5), index, position)
        for score, index, position in _recomputations(retention)
    ]
    for _, index, position in sorted(candidates):
        if effort.left(retention) and index in retention.lists[position]:
            _try_keep(retention, index, position, budget_bytes)
    improve(retention, budget_bytes, effort)
