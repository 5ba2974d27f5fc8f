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

from dataclasses import dataclass

import numpy as np

from packlight.planner.facts import Segment

INFINITY = np.inf


@dataclass
class Chain:
    """The table of the dynamic program for one memory size.

    Attributes:
        segments: from `build_segments`.
        budget_bytes: what the table's highest level stands for.
        num_levels: how finely memory is divided; sizes round up to whole levels.
    """

    segments: list[Segment]
    budget_bytes: int
    sizes: list[int]
    num_levels: int = 400

    def __post_init__(self) -> None:
        num = len(self.segments)
        self.level_bytes = max(1.0, self.budget_bytes / self.num_levels)
        self.forward_until = np.concatenate(
            [[0.0], np.cumsum([s.forward_seconds for s in self.segments])]
        )
        self.carry = self._carries()
        self.best = np.full((num, num, self.num_levels + 1), INFINITY, dtype=np.float64)
        self._fill()

    def _levels(self, num_bytes: float) -> int:
        return int(min(np.ceil(max(0.0, num_bytes) / self.level_bytes), self.num_levels + 1))

    def _carries(self) -> np.ndarray:
        """Return carry[s, j]: bytes of segment j's input that are not held as segment s's input."""
        num = len(self.segments)
        carry = np.zeros((num, num), dtype=np.int64)
        for s in range(num):
            mine = self.segments[s].frontier
            for j in range(s + 1, num):
                carry[s, j] = sum(
                    self.sizes[b] for b in self.segments[j].frontier if b not in mine
                )
        return carry

    def _fill(self) -> None:
        num, levels = len(self.segments), self.num_levels
        carry_levels = np.ceil(self.carry / self.level_bytes).astype(np.int64)
        forward_levels = np.array([
            [
                self._levels(self.carry[s, q] + self.segments[q].plain_peak_bytes) if q >= s else 0
                for q in range(num)
            ]
            for s in range(num)
        ])
        grid = np.arange(levels + 1)
        for t in range(num):
            pile = self._levels(self.segments[t].pile_bytes)
            for s in range(t, -1, -1):
                best = self._one_segment(s) if s == t else np.full(levels + 1, INFINITY)
                if s < t:
                    best = np.minimum(best, self._keep(s, t, pile))
                    # Store the input of j: all j at once.
                    js = np.arange(s + 1, t + 1)
                    shifts = carry_levels[s, js]
                    index = grid[None, :] - shifts[:, None]
                    right = self.best[js[:, None], t, np.maximum(index, 0)]
                    right = np.where(index >= 0, right, INFINITY)
                    left = self.best[s, js - 1, :]
                    forward = self.forward_until[js] - self.forward_until[s]
                    need = np.maximum.accumulate(forward_levels[s, s:t]) + pile
                    total = right + left + forward[:, None]
                    total = np.where(grid[None, :] >= need[:, None], total, INFINITY)
                    best = np.minimum(best, total.min(axis=0))
                self.best[s, t] = best

    def _one_segment(self, s: int) -> np.ndarray:
        result = np.full(self.num_levels + 1, INFINITY)
        pile = self.segments[s].pile_bytes
        for option in self.segments[s].options:
            need = self._levels(max(option.forward_peak_bytes + pile, option.backward_peak_bytes))
            if need <= self.num_levels:
                result[need:] = np.minimum(result[need:], option.extra_seconds)
        return result

    def _keep(self, s: int, t: int, pile: int) -> np.ndarray:
        result = np.full(self.num_levels + 1, INFINITY)
        for option in self.segments[s].options:
            shift = self._levels(option.kept_bytes)
            need = max(
                self._levels(option.forward_peak_bytes) + pile,
                self._levels(option.backward_peak_bytes),
                shift,
            )
            if need <= self.num_levels:
                rest = self.best[s + 1, t, need - shift : self.num_levels + 1 - shift]
                result[need:] = np.minimum(result[need:], option.extra_seconds + rest)
        return result

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
        pile = self._levels(self.segments[t].pile_bytes)
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
            shift = int(np.ceil(self.carry[s, j] / self.level_bytes))
            if shift > m:
                continue
            forward = self.forward_until[j] - self.forward_until[s]
            value = forward + self.best[j, t, m - shift] + self.best[s, j - 1, m]
            need = pile + max(
                self._levels(self.carry[s, q] + self.segments[q].plain_peak_bytes)
                for q in range(s, j)
            )
            if need <= m and abs(value - target) <= close:
                forwards = [("forward", q, q, m) for q in range(s, j)]
                return [*forwards, ("solve", j, t, m - shift), ("solve", s, j - 1, m)]
        raise AssertionError("no decision leads to the table's value")
