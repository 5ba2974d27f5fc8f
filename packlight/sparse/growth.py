"""Methods that grow where the gradient is large, without ever holding a dense gradient.

In the step before a change, the backward of each layer shows what it knows (`ops.SeenGradient`).
The best free places are kept beside the weight, in a vector that is there all the time, so that a
planned step counts it. With microbatches, or where layers share a weight, the last backward counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, cos, pi
from typing import Any, ClassVar

import torch

from packlight.sparse import pattern
from packlight.sparse.method import Change, Method, Run, smallest_dropped
from packlight.sparse.ops import SeenGradient
from packlight.sparse.sampling import is_in
from packlight.sparse.weight import SparseWeight

# So much of a dense gradient is there at a time.
BLOCK_ELEMENTS = 2**16


@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """The rigged lottery (Evci et al. 2020): the smallest go, those of largest gradient come in.

    A change at step t exchanges fraction / 2 * (1 + cos(pi * t / until)) of each layer; without
    `until`, always `fraction`. Differs from the paper: what is dropped does not come back at once.

    Attributes:
        fraction: of each layer's values that are exchanged at first.
    """

    name: ClassVar[str] = "rigl"
    densities: str = "erk"
    fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("fraction", 0 < self.fraction < 1, "between 0 and 1")

    def set_up(self, weights: Sequence[SparseWeight], run: Run) -> None:
        """Make room for the best free places of each weight."""
        for weight in weights:
            most = min(ceil(self.fraction * weight.num_nonzeros), weight.numel())
            number = torch.int32 if weight.numel() < 2**31 else torch.int64
            best = torch.full((most,), -1, dtype=number, device=weight.device)
            weight.register_buffer("best_free", best, persistent=False)

    def observer(self, weight: SparseWeight, run: Run) -> Any:
        """Look at the dense gradient, block after block of rows."""
        return partial(_find_best, weight)

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Exchange the smallest values for the best free places seen in this step."""
        fraction = self.fraction
        if self.until is not None:
            fraction *= (1 + cos(pi * run.step / self.until)) / 2
        result: list[Change | None] = []
        for weight in weights:
            best: Any = weight.best_free
            free = best[best >= 0].to(torch.int64)
            best.fill_(-1)
            count = min(int(fraction * weight.num_nonzeros), len(free))
            if count == 0:  # the layer had no gradient in this step, or is full
                result.append(None)
                continue
            kept = smallest_dropped(weight.values, count)
            result.append(Change(kept, free[:count].sort().values))
        return result


@dataclass(frozen=True, kw_only=True)
class GuidedExploration(RigL):
    """Guided stochastic exploration (Heddes et al. 2024, arXiv 2401.06898): RigL on a sample.

    Gradients are computed at sampled free places only, of which the best come in: time and memory
    grow with nonzeros and neurons, not with the weight. A place (output, input) is drawn with
    probability |gradients of the output| * |inputs| (the paper's GraBo), or evenly.

    Attributes:
        samples: how many places are drawn, over the number of nonzeros.
        is_even: draw evenly.
    """

    name: ClassVar[str] = "gse"
    samples: float = 1.0
    is_even: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("samples", self.samples > 0, "above 0")

    def observer(self, weight: SparseWeight, run: Run) -> Any:
        """Look at the gradient at a sample of places."""
        return partial(_find_best_of_sample, weight, self, run.generator)


def _find_best(weight: SparseWeight, seen: SeenGradient) -> None:
    rows, columns = pattern.matrix_shape(weight.shape)
    step = max(1, min(BLOCK_ELEMENTS // columns, seen.group_rows))
    bounds = [
        (first, min(first + step, group + seen.group_rows))
        for group in range(0, rows, seen.group_rows)
        for first in range(group, group + seen.group_rows, step)
    ]
    starts = pattern.row_starts(weight.index, weight.shape)
    num_best = len(weight.best_free)  # type: ignore[arg-type]
    scores, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for first, last in bounds:
        block = seen.rows(first, last).reshape(-1).abs_()
        block[pattern.decode_rows(weight.index, weight.shape, starts, first, last)] = -1.0
        best = block.topk(min(num_best, len(block)))
        scores = torch.cat([scores, best.values])
        places = torch.cat([places, best.indices + first * columns])
        if len(scores) > num_best:
            scores, order = scores.topk(num_best)
            places = places[order]
    _note_best(weight, scores, places)


def _find_best_of_sample(
    weight: SparseWeight, method: GuidedExploration, generator: torch.Generator, seen: SeenGradient
) -> None:
    rows, columns = pattern.matrix_shape(weight.shape)
    count = ceil(method.samples * weight.num_nonzeros)

    def drawn(sizes: torch.Tensor) -> torch.Tensor:
        if method.is_even or not float(sizes.sum()) > 0:
            return torch.randint(len(sizes), (count,), generator=generator)
        return torch.multinomial(sizes, count, replacement=True, generator=generator)

    row = drawn(seen.row_sizes())
    sampled = (row * columns + drawn(seen.column_sizes())).unique()  # type: ignore[no-untyped-call]
    sampled = sampled[~is_in(sampled, weight.positions())]
    if len(sampled):
        index = pattern.encode(sampled, weight.shape)
        _note_best(weight, seen.at_pattern(index, len(sampled)).abs_(), sampled)


def _note_best(weight: SparseWeight, scores: torch.Tensor, places: torch.Tensor) -> None:
    """Write down the best free places, the best first."""
    best_free: Any = weight.best_free
    scores, order = scores.topk(min(len(best_free), len(scores)))
    is_free = scores >= 0  # those that are taken have -1
    count = int(is_free.sum())
    best_free.fill_(-1)
    best_free[:count] = places[order[:count]].to(best_free.dtype)
