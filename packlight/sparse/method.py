"""What a method of sparse training decides: where weights start, what is dropped, what grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from packlight.errors import OptionError, SparsityError
from packlight.sparse.sampling import sample_distinct, sample_free
from packlight.sparse.weight import SparseWeight


class Place(NamedTuple):
    """A weight before it is sparse.

    Attributes:
        name: of its layer.
        shape: of the weight.
        is_embedding: whether rows are looked up.
    """

    name: str
    shape: torch.Size
    is_embedding: bool


class Change(NamedTuple):
    """What becomes of a weight's pattern.

    Attributes:
        kept: bool, for each value.
        grown: positions that come in, ascending, none of them kept; new values are zero, and so is
            their optimizer state.
    """

    kept: torch.Tensor
    grown: torch.Tensor


@dataclass
class Run:
    """What a method knows of the training so far; all of it is saved.

    Attributes:
        step: optimizer steps done.
        generator: of random places.
        numbers: what the method remembers, by name.
    """

    step: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train with sparse weights; fields are its settings.

    A method is this class with what differs overridden; `changes` is called where `is_due`, after
    the optimizer's step, and what it returns is done to values, index and optimizer state.

    Attributes:
        every: so many steps lie between two changes.
        until: the last step with a change; None for no end.
        densities: of layers at the start: "uniform", or "erk", higher in smaller layers
            (Erdos-Renyi with kernels: Evci et al. 2020).
    """

    name: ClassVar[str]
    every: int = 100
    until: int | None = None
    densities: str = "uniform"

    def __post_init__(self) -> None:
        self._check("every", self.every >= 1, "at least 1")
        self._check("until", self.until is None or self.until >= 1, "None or at least 1")
        self._check("densities", self.densities in ("uniform", "erk"), "'uniform' or 'erk'")

    def _check(self, field_name: str, is_right: bool, what: str) -> None:
        if not is_right:
            value = getattr(self, field_name)
            raise OptionError(f"{type(self).__name__}({field_name}={value!r}); it must be {what}")

    def is_due(self, step: int) -> bool:
        """Whether patterns change after a step, counted from 1."""
        return step % self.every == 0 and (self.until is None or step <= self.until)

    def start(
        self, places: Sequence[Place], density: float, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Return where each weight has its first values: ascending positions, at random."""
        counts = start_counts(places, density, self.densities)
        return [
            sample_distinct(count, place.shape.numel(), generator)
            for count, place in zip(counts, places, strict=True)
        ]

    def set_up(self, weights: Sequence[SparseWeight], run: Run) -> None:
        """Add what has to be remembered for each weight or value."""

    def observer(self, weight: SparseWeight, run: Run) -> Any:
        """Return who is shown the gradient (`ops.SeenGradient`) in a step before a change."""
        return None

    def after_step(self, weights: Sequence[SparseWeight], run: Run, lrs: Sequence[float]) -> None:
        """Do what is done in every step, after the optimizer's.

        Args:
            weights: all of them.
            run: its step counts the one that was just done.
            lrs: learning rate of each weight.
        """

    def changes(self, weights: Sequence[SparseWeight], run: Run) -> list[Change | None]:
        """Return what changes; None where nothing does."""
        return [None] * len(weights)

    def after_change(self, weight: SparseWeight, is_new: torch.Tensor, run: Run) -> None:
        """Set what the method keeps for values that have just come in (a mask)."""


def start_counts(places: Sequence[Place], density: float, how: str) -> list[int]:
    """Return how many nonzeros each weight starts with; density * all elements together."""
    sizes = [place.shape.numel() for place in places]
    total = round(density * sum(sizes))
    shares = [float(size) for size in sizes]
    if how == "erk":
        # A density of (rows + columns + kernel sizes) over their product, times all elements.
        shares = [float(sum(place.shape)) for place in places]
    return apportioned(total, shares, sizes)


def apportioned(total: int, shares: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """Return whole numbers as proportional to shares as can be, none above its room.

    What does not fit goes to the others in proportion; the last units to the largest remainders.

    Raises:
        SparsityError: there is less room than what is to be given away.

    >>> apportioned(10, [1, 1, 2], [9, 9, 3])
    [4, 3, 3]
    """
    if total > sum(room for room, share in zip(rooms, shares, strict=True) if share > 0):
        raise SparsityError(f"{total} nonzeros do not fit in layers of {list(rooms)} free elements")
    given = [0.0] * len(shares)
    open_ = [i for i, share in enumerate(shares) if share > 0]
    left = float(total)
    while open_:
        scale = left / sum(shares[i] for i in open_)
        full = [i for i in open_ if scale * shares[i] >= rooms[i]]
        if not full:
            for i in open_:
                given[i] = scale * shares[i]
            break
        for i in full:
            given[i] = float(rooms[i])
            left -= rooms[i]
        open_ = [i for i in open_ if i not in full]
    counts = [int(number) for number in given]
    by_remainder = sorted(open_, key=lambda i: counts[i] - given[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def smallest_dropped(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask that keeps all but so many values of least magnitude."""
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[values.detach().abs().topk(count, largest=False).indices] = False
    return kept


def grown_at_random(
    weight: SparseWeight, kept: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Return places that are free once what is not kept is gone; all are equally likely."""
    taken = weight.positions()[kept]
    return sample_free(count, taken, weight.numel(), generator)
