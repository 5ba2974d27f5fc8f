"""A dynamic program over segments: which option each runs with, and where recomputation nests.

The optimal persistent schedule of a heterogeneous chain with several options per stage (Beaumont et
al., Rotor, arXiv 1911.13214; several options as in Rockmate, Zhao et al. 2023), with two changes: a
boundary may be several buffers (skip connections are carried through, counted once), and gradients
that pile up from later segments narrow the memory of earlier ones. With m levels of memory left,
C[s, t, m] is the least recomputation for the backward of segments s..t, their input in memory:

    base    C[s,s] = min over options k                       if forward and backward peaks fit
    store   C[s,t] = min over j  forward(s..j-1) + C[j,t](m - frontier j) + C[s,j-1](m)
    keep    C[s,t] = min over k  extra(s,k) + C[s+1,t](m - kept(s,k))

The time of one forward and backward of each segment is left out: it is the same in all schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packlight.planner.facts import Segment

INFINITY = np.inf


@dataclass
class Chain:
    """The table of the dynamic program for one memory size.

    Attributes:
        segments: from `build_segments`.
        budget_bytes: what the table's highest level stands for.
        carry: see `carries`.
        num_levels: how finely memory is divided; sizes round up to whole levels.
    """

    segments: Sequence[Segment]
    budget_bytes: int
    carry: npt.NDArray[np.int64]
    num_levels: int = 400

    def __post_init__(self) -> None:
        num = len(self.segments)
        self.level_bytes = max(1.0, self.budget_bytes / self.num_levels)
        self.forward_until = np.concatenate(
            [[0.0], np.cumsum([s.forward_seconds for s in self.segments])]
        )
        self.pile = [self._levels(s.pile_bytes) for s in self.segments]
        self.carry_levels = np.ceil(self.carry / self.level_bytes).astype(np.int64)
        # need[s, j]: levels to run the forward of s..j-1, the input of s in memory.
        plain = np.array([s.plain_peak_bytes for s in self.segments], dtype=np.int64)
        levels = np.ceil(np.maximum(self.carry + plain, 0) / self.level_bytes)
        levels = np.minimum(levels, self.num_levels + 1).astype(np.int64)
        self.need = np.zeros((num, num + 1), dtype=np.int64)
        for s in range(num):
            self.need[s, s + 1 :] = np.maximum.accumulate(levels[s, s:])
        self.best = np.full((num, num, self.num_levels + 1), INFINITY, dtype=np.float64)
        self._fill()

    def _levels(self, num_bytes: float) -> int:
        return int(min(math.ceil(max(0.0, num_bytes) / self.level_bytes), self.num_levels + 1))

    def _fill(self) -> None:
        num, levels = len(self.segments), self.num_levels
        # For the s at hand, [t, j]: the forward of s..j-1, and C[j,t] beside the input of j.
        right = np.full((num, num, levels + 1), INFINITY)
        total = np.empty((num, levels + 1))
        for s in range(num - 1, -1, -1):
            for j in range(s + 1, num):
                shift = int(self.carry_levels[s, j])
                forward = self.forward_until[j] - self.forward_until[s]
                right[j:, j, :shift] = INFINITY
                np.add(
                    self.best[j, j:, : max(0, levels + 1 - shift)], forward,
                    out=right[j:, j, shift:],
                )
            mine = self.best[s]
            self._keep(s)
            self._one_segment(s)
            # From which j on more levels are needed.
            steps = np.flatnonzero(np.diff(self.need[s, s + 1 :], prepend=-1)) + s + 1
            for t in range(s + 1, num):
                # Store the input of j: all j at once.
                of_j = np.add(right[t, s + 1 : t + 1], mine[s:t], out=total[s:t])
                for j in steps[steps <= t].tolist():
                    of_j[j - s - 1 :, : self.need[s, j] + self.pile[t]] = INFINITY
                np.minimum(mine[t], of_j.min(axis=0), out=mine[t])

    def _one_segment(self, s: int) -> None:
        row, pile = self.best[s, s], self.segments[s].pile_bytes
        for option in self.segments[s].options:
            need = self._levels(max(option.forward_peak_bytes + pile, option.backward_peak_bytes))
            if need <= self.num_levels:
                np.minimum(row[need:], option.extra_seconds, out=row[need:])

    def _keep(self, s: int) -> None:
        """Keep what an option keeps while the segments up to t run: all t with the same pile."""
        num, levels = len(self.segments), self.num_levels
        for option in self.segments[s].options:
            shift = self._levels(option.kept_bytes)
            forward = self._levels(option.forward_peak_bytes)
            least = max(self._levels(option.backward_peak_bytes), shift)
            first = s + 1
            for t in range(s + 2, num + 1):
                if t == num or self.pile[t] != self.pile[first]:
                    need = max(forward + self.pile[first], least)
                    if need <= levels:
                        rest = self.best[s + 1, first:t, need - shift : levels + 1 - shift]
                        row = self.best[s, first:t, need:]
                        np.minimum(row, option.extra_seconds + rest, out=row)
                    first = t

    @property
    def extra_seconds(self) -> float:
        """Least recomputation within the budget (infinite if nothing fits)."""
        return float(self.best[0, len(self.segments) - 1, self.num_levels])

    def smallest_level(self) -> int | None:
        """Return the least number of levels that fits, or None."""
        finite = np.flatnonzero(np.isfinite(self.best[0, len(self.segments) - 1]))
        return int(finite[0]) if len(finite) else None

    def level_within(self, num_bytes: int) -> int:
        """Return the highest level within a number of bytes."""
        return max(0, min(self.num_levels, int(num_bytes / self.level_bytes)))

    def order(self, level: int | None = None) -> list[int]:
        """Return operations in the order of the best schedule within a level (default: highest).

        Whole segments are run again where something of them is needed; recomputations that nobody
        needs are for the caller to remove.
        """
        order: list[int] = []
        level = self.num_levels if level is None else level
        stack: list[tuple[str, int, int, int]] = [("solve", 0, len(self.segments) - 1, level)]
        while stack:
            what, s, t, m = stack.pop()
            if what == "forward":
                order.extend(self.segments[s].forward)
            elif what == "backward":
                order.extend(self.segments[s].options[t].backward_order)
            else:
                stack.extend(reversed(self._decide(s, t, m)))
        return order

    def _decide(self, s: int, t: int, m: int) -> list[tuple[str, int, int, int]]:
        target = self.best[s, t, m]
        assert np.isfinite(target), "asked for the order of a budget that does not fit"
        close = 1e-12 + 1e-9 * abs(target)
        pile = self.pile[t]
        if s == t:
            for k, option in enumerate(self.segments[s].options):
                need = self._levels(
                    max(option.forward_peak_bytes + self.segments[s].pile_bytes,
                        option.backward_peak_bytes)
                )
                if need <= m and abs(option.extra_seconds - target) <= close:
                    return [("forward", s, s, m), ("backward", s, k, m)]
        for k, option in enumerate(self.segments[s].options):
            shift = self._levels(option.kept_bytes)
            need = max(
                self._levels(option.forward_peak_bytes) + pile,
                self._levels(option.backward_peak_bytes),
                shift,
            )
            if s < t and need <= m:
                if abs(option.extra_seconds + self.best[s + 1, t, m - shift] - target) <= close:
                    return [
                        ("forward", s, s, m), ("solve", s + 1, t, m - shift), ("backward", s, k, m),
                    ]
        for j in range(s + 1, t + 1):
            shift = int(self.carry_levels[s, j])
            if self.need[s, j] + pile > m:
                break
            if shift > m:
                continue
            forward = self.forward_until[j] - self.forward_until[s]
            value = forward + self.best[j, t, m - shift] + self.best[s, j - 1, m]
            if abs(value - target) <= close:
                forwards = [("forward", q, q, m) for q in range(s, j)]
                return [*forwards, ("solve", j, t, m - shift), ("solve", s, j - 1, m)]
        raise AssertionError("no decision leads to the table's value")


def carries(segments: Sequence[Segment], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return carry[s, j]: bytes of segment j's input that are not held as segment s's input.

    Args:
        segments: in order.
        sizes: of all buffers.
    """
    num = len(segments)
    carry = np.zeros((num, num), dtype=np.int64)
    for j in range(num):
        whole = [(b, sizes[b]) for b in segments[j].frontier]
        for s in range(j):
            mine = segments[s].frontier
            carry[s, j] = sum([size for b, size in whole if b not in mine])
    return carry
