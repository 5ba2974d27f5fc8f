"""Local moves on a schedule's retention intervals: drop a buffer over a gap, or keep it there.

This handles what a chain of segments cannot see: long skips, shared parameters, gradients that pile
up while activations go away, the loss head. Every move is judged by the peak that it really gives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packlight.planner.intervals import Interval
from packlight.planner.retention import Retention

EPSILON_SECONDS = 1e-12
# So many looks at what could be held count as one evaluation.
LOOKS = 4
# Of the peak: how far `lower` tries to bring it down at once. How many evaluations that may take,
# and how often it goes on from more that is kept without getting lower.
FIRST_STEP, SECOND_STEP, LARGEST_STEP, LEAST_STEP = 0.05, 0.02, 0.1, 0.001
ATTEMPT, MAX_STALL = 3_000, 3


@dataclass
class Effort:
    """How much work refinement may do, in evaluations of positions: plans are reproducible."""

    evaluations: int

    def left(self, retention: Retention) -> bool:
        """Whether there is any left."""
        return _done(retention) < self.evaluations

    def more(self, retention: Retention, evaluations: int) -> None:
        """Allow some evaluations from here on."""
        self.evaluations = _done(retention) + evaluations


def _done(retention: Retention) -> int:
    return retention.num_evaluations + retention.num_looks // LOOKS


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
    result: list[tuple[int, list[Interval]]] = []
    for buffer in retention.droppable_at(position):
        if (buffer, position) not in tabu:
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
    retention.num_looks += 1
    fills = []
    for buffer in retention.creates[index]:
        if retention.is_read_at(buffer, position):
            filled = retention.with_gap_filled(buffer, position)
            if filled is not None:
                fills.append((buffer, *filled))
    for buffer, _, latest in fills:
        between = slice(latest + 1, position)
        window = retention.held.bytes[between] + retention.local_bytes[between]
        if len(window) and int(window.max()) + retention.size[buffer] > budget_bytes:
            return False
    seconds = retention.total_extra_seconds
    vanished = retention.used_by(position)
    mark = retention.mark()
    ok = bool(fills)
    for buffer, new, _ in fills:
        ok = ok and retention.set_intervals(buffer, new)
    if ok and retention.total_extra_seconds < seconds - EPSILON_SECONDS:
        if retention.peak_bytes <= budget_bytes:
            for buffer in vanished:
                retention.trim(buffer)
            return True
    retention.undo_to(mark)
    return False


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
        if intervals and retention.can_drop(buffer) and buffer not in retention.due
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


def lower(retention: Retention, effort: Effort, floor_bytes: int = 0) -> None:
    """Bring the peak down as far as drops can, whatever the seconds.

    Steps grow as long as they succeed and are halved when they fail. Where even small ones do,
    keeping whatever fits below the peak shortens recomputations, and opens new ways down.

    Args:
        retention: is changed; its peak never grows.
        effort: for all.
        floor_bytes: no peak is lower.
    """
    mark, best_bytes = retention.mark(), retention.peak_bytes
    step, stall = FIRST_STEP, 0
    while effort.left(retention) and best_bytes > floor_bytes and stall <= MAX_STALL:
        if step > LEAST_STEP:
            target_bytes = max(floor_bytes, int(best_bytes * (1 - step)))
            attempt = Effort(min(effort.evaluations, _done(retention) + ATTEMPT))
            if repair(retention, target_bytes, attempt):
                mark, best_bytes = retention.mark(), retention.peak_bytes
                step, stall = min(LARGEST_STEP, 1.5 * step), 0
            else:
                retention.undo_to(mark)
                step /= 2
        else:
            step, stall = SECOND_STEP, stall + 1
            improve(retention, best_bytes, effort)
            mark, best_bytes = retention.mark(), min(best_bytes, retention.peak_bytes)
