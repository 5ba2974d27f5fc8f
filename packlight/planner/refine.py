"""Local moves on a schedule's retention intervals: drop a buffer over a gap, or keep it there.

This handles what a chain of segments cannot see: long skips, shared parameters, gradients that pile
up while activations go away, the loss head. Every move is judged by the peak that it really gives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packlight.planner.retention import Interval, Retention

EPSILON_SECONDS = 1e-12


@dataclass
class Effort:
    """How much work refinement may do, in evaluations of positions: plans are reproducible."""

    evaluations: int

    def left(self, retention: Retention) -> bool:
        """Whether there is any left."""
        return retention.num_evaluations < self.evaluations

    def more(self, retention: Retention, evaluations: int) -> None:
        """Allow some evaluations from here on."""
        self.evaluations = retention.num_evaluations + evaluations


def repair(retention: Retention, budget_bytes: int, effort: Effort, width: int = 6) -> bool:
    """Drop buffers where the peak is above the budget until it is not; return whether that worked.

    At the highest position, the drops that promise most bytes per second are tried, and the one
    with the best measured ratio of bytes above the budget removed to seconds added is taken. A drop
    that did not help is not tried at that position again, so this ends.
    """
    tabu: set[tuple[int, int]] = set()
    while True:
        peaks = retention.peaks
        worst = int(np.argmax(peaks))
        if peaks[worst] <= budget_bytes:
            return True
        if not effort.left(retention):
            return False
        candidates = _drop_candidates(retention, worst, tabu)[:width]
        if not candidates:
            return False
        before = _excess(peaks, budget_bytes)
        seconds = retention.total_extra_seconds
        best: tuple[float, int, list[Interval]] | None = None
        for buffer, new in candidates:
            mark = retention.mark()
            if retention.replace_intervals(buffer, new):
                after = retention.peaks
                gain = before - _excess(after, budget_bytes)
                if gain > 0 and after[worst] < peaks[worst]:
                    score = gain / (retention.total_extra_seconds - seconds + 1e-9)
                    if best is None or score > best[0]:
                        best = (score, buffer, new)
            retention.undo_to(mark)
        if best is None:
            tabu.update((buffer, worst) for buffer, _ in candidates)
        else:
            retention.replace_intervals(best[1], best[2])


def _excess(peaks: npt.NDArray[np.int64], budget_bytes: int) -> float:
    return float(np.maximum(peaks - budget_bytes, 0).sum())


def _drop_candidates(
    retention: Retention, position: int, tabu: set[tuple[int, int]]
) -> list[tuple[int, list[Interval]]]:
    """Return (buffer, new intervals) for what could be dropped at a position, best first."""
    needed = retention.used[position]
    found: list[tuple[bool, float, int]] = []
    for buffer in retention.held_at(position):
        size = retention.size[buffer]
        if size and not retention.is_fixed[buffer] and buffer not in needed:
            if (buffer, position) not in tabu:
                seconds = retention.seconds[retention.maker[buffer]]
                found.append((buffer in retention.due, -size / (seconds + 1e-9), buffer))
    found.sort()
    result = []
    for _, _, buffer in found:
        new = retention.without_gap(buffer, position)
        if new is not None:
            result.append((buffer, new))
            if len(result) == 8:  # more than any caller tries
                break
    return result


def improve(retention: Retention, budget_bytes: int, effort: Effort) -> None:
    """Keep buffers that are recomputed wherever that fits, the most seconds per byte first."""
    changed = True
    while changed and effort.left(retention):
        changed = False
        for _, index, position in sorted(_recomputations(retention)):
            if not effort.left(retention):
                return
            if index in retention.lists[position]:
                changed = _try_keep(retention, index, position, budget_bytes) or changed


def _recomputations(retention: Retention) -> list[tuple[float, int, int]]:
    """Return (score, operation, position) of recomputations, lowest where one is best avoided."""
    found: list[tuple[float, int, int]] = []
    for index, positions in sorted(retention.rerun_at.items()):
        size = sum(retention.size[b] for b in retention.creates[index]) + 1
        score = -retention.seconds[index] / size
        found.extend((score, index, position) for position in sorted(positions))
    return found


def _try_keep(retention: Retention, index: int, position: int, budget_bytes: int) -> bool:
    """Hold what an operation made until a position, instead of running it again there."""
    fills = []
    for buffer in retention.creates[index]:
        if _is_read_at(retention, buffer, position):
            filled = retention.with_gap_filled(buffer, position)
            if filled is not None:
                fills.append((buffer, *filled))
    for buffer, _, latest in fills:
        window = retention.peaks[latest + 1 : position]
        if len(window) and int(window.max()) + retention.size[buffer] > budget_bytes:
            return False
    seconds = retention.total_extra_seconds
    vanished = set(retention.used[position])
    mark = retention.mark()
    ok = bool(fills)
    for buffer, new, _ in fills:
        ok = ok and retention.set_intervals(buffer, new)
    if ok and retention.total_extra_seconds < seconds - EPSILON_SECONDS:
        if retention.peak_bytes <= budget_bytes:
            for buffer in sorted(vanished):
                retention.trim(buffer)
            return True
    retention.undo_to(mark)
    return False


def _is_read_at(retention: Retention, buffer: int, position: int) -> bool:
    if buffer in retention.reads[position] or buffer in retention.starts[position]:
        return True
    return any(buffer in retention.reads[i] for i in retention.lists[position])


def shake(
    retention: Retention, budget_bytes: int, effort: Effort, seed: int = 0, stall: int = 60
) -> None:
    """Drop a few buffers at random, refill greedily, and keep what turned out faster.

    Ruin and recreate (Schrimpf et al. 2000) with a fixed seed; stops after `stall` rounds without
    gain.
    """
    generator = random.Random(seed)
    best_seconds = retention.total_extra_seconds
    without_gain = 0
    while effort.left(retention) and without_gain < stall and best_seconds > EPSILON_SECONDS:
        held = droppable(retention)
        if not held:
            return
        mark = retention.mark()
        feasible = ruin_and_recreate(retention, held, budget_bytes, effort, generator)
        if feasible and retention.total_extra_seconds < best_seconds - EPSILON_SECONDS:
            best_seconds = retention.total_extra_seconds
            without_gain = 0
        else:
            without_gain += 1
            retention.undo_to(mark)


def droppable(retention: Retention) -> list[tuple[int, Interval]]:
    """Return the intervals in which a buffer is held that could be dropped."""
    return [
        (buffer, interval)
        for buffer, intervals in enumerate(retention.intervals)
        if not retention.is_fixed[buffer] and retention.size[buffer] > 0
        if buffer not in retention.due
        for interval in intervals
    ]


def ruin_and_recreate(
    retention: Retention, held: list[tuple[int, Interval]], budget_bytes: int, effort: Effort,
    generator: random.Random,
) -> bool:
    """Drop a few of the intervals at random places and refill; return whether that fits."""
    for buffer, (start, end) in generator.sample(held, min(len(held), generator.randint(1, 4))):
        new = retention.without_gap(buffer, generator.randint(start + 1, end))
        if new is not None:
            retention.set_intervals(buffer, new)
    if not repair(retention, budget_bytes, effort):
        return False
    _improve_shuffled(retention, budget_bytes, effort, generator)
    return True


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


def lower(retention: Retention, effort: Effort) -> None:
    """Bring the peak down as far as drops can, whatever the seconds."""
    share = 0.9
    mark = retention.mark()
    while effort.left(retention) and share < 0.9999:
        if repair(retention, int(retention.peak_bytes * share), effort):
            mark = retention.mark()
        else:
            retention.undo_to(mark)
            share = 1 - (1 - share) / 2
