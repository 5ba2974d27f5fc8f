"""Where a chain of layers is cut into stages, and what each stage keeps: dynamic programming.

In a pipeline that flushes, m microbatches through stages of t_1 .. t_p seconds take about

    sum(t) + (m - 1) max(t)

and 1F1B holds min(p - i, m) microbatches at once in stage i (counted from 0), so a stage's place
decides how much it may keep of each, and that how many seconds it takes. From the last stage
backwards all pairs (max, sum) that no other beats are kept: for every number of stages and every
first layer. So the optimum is exact for that objective; the schedule is simulated afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from packlight.cluster.costs import Choice, Kept, Layer, cheapest_within, convex


@dataclass(frozen=True, slots=True)
class Stage:
    """Some layers in a row, and what they keep.

    Attributes:
        start, end: the layers [start, end).
        seconds: of one microbatch, forward and backward.
        choices: one for each layer.
        bound_seconds: no choices that fit are faster.
    """

    start: int
    end: int
    seconds: float
    choices: tuple[Choice, ...]
    bound_seconds: float


class Leaves:
    """What a stage costs: any layers in a row, with so many microbatches in flight.

    Args:
        layers: the chain.
        static_bytes: what so many parameters hold throughout.
        budget_bytes: of each rank.
        overhead_seconds: of each microbatch in each stage: messages.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        static_bytes: Callable[[int], int],
        budget_bytes: int,
        overhead_seconds: float = 0.0,
    ) -> None:
        self.layers = list(layers)
        self.budget_bytes = budget_bytes
        self._static_bytes = static_bytes
        self._overhead = overhead_seconds
        self._parameters = [0]
        self._seconds = [0.0]
        for layer in layers:
            self._parameters.append(self._parameters[-1] + layer.parameters)
            self._seconds.append(self._seconds[-1] + layer.seconds)
        # Equal layers are the same object or equal objects: stages are told apart by their runs.
        numbers: dict[Layer, int] = {}
        self._number = [numbers.setdefault(layer, len(numbers)) for layer in layers]
        self._fronts = {number: convex(layer.choices) for layer, number in numbers.items()}
        self._spare = {number: layer.workspace_bytes for layer, number in numbers.items()}
        self._known: dict[tuple[tuple[tuple[int, int], ...], float], Kept | None] = {}

    def parameters(self, start: int, end: int) -> int:
        """Return how many parameters layers [start, end) have on one rank."""
        return self._parameters[end] - self._parameters[start]

    def plain_seconds(self, start: int, end: int) -> float:
        """Return the seconds of layers [start, end) with nothing computed again."""
        return self._seconds[end] - self._seconds[start] + self._overhead

    def stage(self, start: int, end: int, frames: float) -> Stage | None:
        """Return the fastest stage of layers [start, end) that fits with `frames` in flight."""
        runs = self._runs(start, end)
        kept = self._kept(runs, frames, start, end)
        if kept is None:
            return None
        plain = self.plain_seconds(start, end)
        choices: list[Choice] = []
        for (number, _), counts in zip(runs, kept.counts, strict=True):
            for choice, count in zip(self._fronts[number], counts, strict=True):
                choices += [choice] * count
        return Stage(
            start, end, plain + kept.extra_seconds, tuple(choices), plain + kept.bound_seconds
        )

    def seconds(self, start: int, end: int, frames: float) -> float:
        """Return the seconds of `stage`, infinity where none fits."""
        kept = self._kept(self._runs(start, end), frames, start, end)
        if kept is None:
            return float("inf")
        return self.plain_seconds(start, end) + kept.extra_seconds

    def least_bytes(self, start: int, end: int, frames: float) -> int:
        """Return the smallest peak of layers [start, end) with `frames` in flight."""
        runs = self._runs(start, end)
        least = sum(self._fronts[number][-1].kept_bytes * count for number, count in runs)
        return int(frames * least) + self._resident(runs, start, end)

    def _runs(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        return tuple(
            (number, len(list(group))) for number, group in groupby(self._number[start:end])
        )

    def _resident(self, runs: tuple[tuple[int, int], ...], start: int, end: int) -> int:
        """Return parameters' bytes and the largest workspace.

        A layer's workspace stands for what it brings back; if it keeps that, it is counted twice.
        """
        workspace = max(
            max(self._spare[number] - self._fronts[number][-1].kept_bytes, 0)
            for number, _ in runs
        )
        return self._static_bytes(self.parameters(start, end)) + workspace

    def _kept(
        self, runs: tuple[tuple[int, int], ...], frames: float, start: int, end: int
    ) -> Kept | None:
        key = (runs, frames)
        if key not in self._known:
            room = (self.budget_bytes - self._resident(runs, start, end)) / frames
            groups = [(self._fronts[number], count) for number, count in runs]
            self._known[key] = None if room < 0 else cheapest_within(groups, room)
        return self._known[key]


def best_stages(
    leaves: Leaves, num_stages: int, num_microbatches: int, limit_seconds: float = float("inf")
) -> list[Stage] | None:
    """Return the stages for which `sum + (m - 1) max` is least.

    Args:
        leaves: what stages cost.
        num_stages: into how many.
        num_microbatches: m.
        limit_seconds: what takes as long or longer is of no interest.

    Returns:
        The stages in order; None where nothing fits, or nothing is faster than the limit.
    """
    num_layers, rest = len(leaves.layers), num_microbatches - 1
    behind: dict[int, list[_Pair]] = {num_layers: [_Pair(0.0, 0.0, num_layers, None)]}
    before = leaves.plain_seconds
    for k in range(1, num_stages + 1):
        frames = min(k, num_microbatches)
        fronts: dict[int, list[_Pair]] = {}
        starts = [0] if k == num_stages else range(num_stages - k, num_layers - k + 1)
        for start in starts:
            found: list[_Pair] = []
            least = 0.0 if start == 0 else before(0, start)
            if start and rest * least / (num_stages - k) >= limit_seconds:
                break  # One of the stages before would take too long.
            for end in range(start + 1, num_layers - k + 2):
                if rest * before(start, end) >= limit_seconds:
                    break
                if end not in behind:
                    continue
                seconds = leaves.seconds(start, end, frames)
                if seconds == float("inf"):
                    break
                for pair in behind[end]:
                    most, total = max(seconds, pair.most), seconds + pair.total
                    if least + total + rest * most < limit_seconds:
                        found.append(_Pair(most, total, end, pair))
            if found:
                fronts[start] = _front(found)
        behind = fronts
    if 0 not in behind:
        return None
    best: _Pair | None = min(behind[0], key=lambda each: each.total + rest * each.most)
    stages: list[Stage] = []
    for k in range(num_stages, 0, -1):
        assert best is not None, "a pair for each stage"
        start = stages[-1].end if stages else 0
        stage = leaves.stage(start, best.end, min(k, num_microbatches))
        assert stage is not None, "it was found before"
        stages.append(stage)
        best = best.behind
    return stages


@dataclass(frozen=True, slots=True)
class _Pair:
    """The most and the sum of some last stages' seconds, where the first ends, what is behind."""

    most: float
    total: float
    end: int
    behind: _Pair | None


def _front(pairs: list[_Pair]) -> list[_Pair]:
    """Return the pairs that no other beats in both numbers."""
    front: list[_Pair] = []
    for pair in sorted(pairs, key=lambda each: (each.most, each.total)):
        if not front or pair.total < front[-1].total:
            front.append(pair)
    return front
