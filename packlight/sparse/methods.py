"""The methods whose growth looks at no gradient. Those that do are in `packlight.sparse.growth`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar

import torch

from packlight.sparse.method import (
    Change,
    Method,
    Place,
    Run,
    apportioned,
    grown_at_random,
    smallest_dropped,
)
from packlight.sparse.weight import SparseWeight


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """A pattern drawn at random, that stays."""

    name: ClassVar[str] = "static"

    def is_due(self, step: int) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True, kw_only=True)
class Thin(Static):
    """A dense network of fewer channels, held in sparse weights: the baseline to be beaten.

    The same share of every layer's outputs and of the next one's inputs is there. The first layer
    keeps all inputs (an embedding all rows), the last one all outputs.
    """

    name: ClassVar[str] = "thin"

    def start(
        self, places: Sequence[Place], density: float, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Return the corner of each weight that makes `density` of all, to the element."""
        total = round(density * sum(place.shape.numel() for place in places))
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            enough = sum(r * c for r, c in _corners(places, middle)) >= total
            low, high = (low, middle) if enough else (middle, high)
        corners = _corners(places, high)
        counts = apportioned(total, [r * c for r, c in corners], [r * c for r, c in corners])
        starts = []
        for place, (_, columns), count in zip(places, corners, counts, strict=True):
            order = torch.arange(count)
            row = order.div(columns, rounding_mode="floor")
            starts.append(row * place.shape[1:].numel() + order - row * columns)
        return starts


def _corners(places: Sequence[Place], share: float) -> list[tuple[int, int]]:
    """Return (rows, columns) of the dense part of each weight."""
    corners = []
    for number, place in enumerate(places):
        rows, inner = place.shape[0], place.shape[1]
        keeps_rows = place.is_embedding or number == len(places) - 1
        keeps_inner = number == 0 and not place.is_embedding
        corners.append((
            rows if keeps_rows else ceil(share * rows),
            (inner if keeps_inner else ceil(share * inner)) * place.shape[2:].numel(),
        ))
    return corners


@dataclass(frozen=True, kw_only=True)
class SET(Method):
    """Sparse evolutionary training (Mocanu et al. 2018): the smallest go, others grow at random.

    Attributes:
        fraction: of each layer's values that are exchanged.
    """

    name: ClassVar[str] = "set"
    fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("fraction", 0 < self.fraction < 1, "between 0 and 1")

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Exchange a fraction of each layer."""
        result: list[Change | None] = []
        for weight in weights:
            count = int(self.fraction * weight.num_nonzeros)
            kept = smallest_dropped(weight.values, count)
            result.append(Change(kept, grown_at_random(weight, kept, count, run.generator)))
        return result


@dataclass(frozen=True, kw_only=True)
class DSR(Method):
    """Dynamic sparse reparameterization (Mostafa and Wang 2019, arXiv 1902.05967), Algorithm 1.

    One threshold prunes all layers: values below it in magnitude go. What was pruned in all layers
    together grows again at random places, in each layer as much as its share of all that survived.
    Where fewer than (1 - tolerance) * target were pruned the threshold doubles, where more than
    (1 + tolerance) * target it halves. The paper rounds each layer's share down; here the last few
    go to the largest remainders (and what a full layer has no room for to the others), so that no
    nonzero is lost.

    Layers change their sizes, so `packlight.fit` plans anew after a change.

    Attributes:
        target: how many values to prune at a time (20,000 in the paper's WRN-28-2); None for
            `fraction` of all.
        fraction: see target.
        tolerance: the paper's delta.
        threshold: the first one.
    """

    name: ClassVar[str] = "dsr"
    target: int | None = None
    fraction: float = 0.07
    tolerance: float = 0.1
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("target", self.target is None or self.target >= 1, "None or at least 1")
        self._check("fraction", 0 < self.fraction < 1, "between 0 and 1")
        self._check("tolerance", 0 <= self.tolerance < 1, "at least 0 and below 1")
        self._check("threshold", self.threshold > 0, "above 0")

    def set_up(self, weights: Sequence[SparseWeight], run: Run) -> None:
        """Start with the first threshold."""
        run.numbers["threshold"] = self.threshold

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Prune by the threshold, adjust it, and grow where most survives."""
        threshold = run.numbers["threshold"]
        kept = [weight.values.detach().abs() >= threshold for weight in weights]
        surviving = [int(mask.sum()) for mask in kept]
        num_values = sum(weight.num_nonzeros for weight in weights)
        num_pruned = num_values - sum(surviving)
        target = self.target or max(1, round(self.fraction * num_values))
        if num_pruned < (1 - self.tolerance) * target:
            run.numbers["threshold"] = 2 * threshold
        elif num_pruned > (1 + self.tolerance) * target:
            run.numbers["threshold"] = threshold / 2
        rooms = [w.numel() - left for w, left in zip(weights, surviving, strict=True)]
        counts = apportioned(num_pruned, surviving, rooms)
        return [
            Change(mask, grown_at_random(weight, mask, count, run.generator))
            for weight, mask, count in zip(weights, kept, counts, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DeepR(Method):
    """Deep rewiring (Bellec et al. 2018): a weight dies where its sign would change.

    Each value has a sign that it keeps. After each step of the optimizer it moves by
    -lr * l1 * sign + sqrt(2 * lr * temperature) * noise; where its sign would then be another it
    goes, and one of a random sign, at zero, is born at a random place of the same layer (the paper
    draws from the whole network: that moves nonzeros between layers at random).

    Attributes:
        l1: strength of the pull towards zero.
        temperature: of the noise.
    """

    name: ClassVar[str] = "deepr"
    every: int = 1
    l1: float = 1e-4
    temperature: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("l1", self.l1 >= 0, "at least 0")
        self._check("temperature", self.temperature >= 0, "at least 0")

    def set_up(self, weights: Sequence[SparseWeight], run: Run) -> None:
        """Give each value the sign that it has."""
        for weight in weights:
            weight.add_per_value("is_negative", weight.values.detach() < 0)

    def after_step(self, weights: Sequence[SparseWeight], run: Run, lrs: Sequence[float]) -> None:
        """Pull towards zero, and shake."""
        for weight, lr in zip(weights, lrs, strict=True):
            values, is_negative = weight.values.detach(), weight.per_value()["is_negative"]
            values.add_(torch.where(is_negative, lr * self.l1, -lr * self.l1).to(values.dtype))
            if self.temperature:
                noise = torch.empty(len(values)).normal_(generator=run.generator)
                values.add_(noise.to(values.dtype), alpha=sqrt(2 * lr * self.temperature))

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Exchange values whose sign is no longer theirs."""
        result: list[Change | None] = []
        for weight in weights:
            values, is_negative = weight.values.detach(), weight.per_value()["is_negative"]
            kept = torch.where(is_negative, values <= 0, values >= 0)
            count = len(values) - int(kept.sum())
            if count == 0:
                result.append(None)
                continue
            result.append(Change(kept, grown_at_random(weight, kept, count, run.generator)))
        return result

    def after_change(self, weight: SparseWeight, is_new: torch.Tensor, run: Run) -> None:
        """Give those that were born random signs."""
        signs = torch.randint(2, (int(is_new.sum()),), generator=run.generator).bool()
        weight.per_value()["is_negative"][is_new] = signs


@dataclass(frozen=True, kw_only=True)
class GradualPruning(Method):
    """Gradual magnitude pruning (Zhu and Gupta 2017): dense at first, sparser step by step.

    Density falls from 1 to d as d + (1 - d) * (1 - (step - begin) / (until - begin))^3; each time
    every layer loses its smallest values. Nothing grows. Layers change their sizes, so
    `packlight.fit` plans anew after a change, and its first budget has to hold the dense model.

    Attributes:
        until: the step at which the density is reached; it has to be given.
        begin: the step before the first change.
    """

    name: ClassVar[str] = "pruning"
    begin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("until", self.until is not None and self.until > self.begin, (
            "the step at which the density is reached, such as "
            f"GradualPruning(until={self.begin + 10 * self.every})"
        ))

    def is_due(self, step: int) -> bool:
        """Whether values go after a step; they do at `until`, whatever `every` is."""
        return step > self.begin and (super().is_due(step) or step == self.until)

    def density_at(self, step: int, density: float) -> float:
        """Return the share of values that is left after a step."""
        assert self.until is not None
        progress = min(max((step - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return density + (1 - density) * (1 - progress) ** 3

    def start(
        self, places: Sequence[Place], density: float, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Return all positions."""
        return [torch.arange(place.shape.numel()) for place in places]

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Drop the smallest of each layer."""
        density = self.density_at(run.step, run.numbers["density"])
        sizes = [float(weight.numel()) for weight in weights]
        total = round(density * sum(sizes))
        result: list[Change | None] = []
        none = torch.empty(0, dtype=torch.int64)
        counts = apportioned(total, sizes, [weight.num_nonzeros for weight in weights])
        for weight, count in zip(weights, counts, strict=True):
            kept = smallest_dropped(weight.values, weight.num_nonzeros - count)
            result.append(Change(kept, none))
        return result
