"""Places drawn at random, without anything as long as the weight."""

from __future__ import annotations

import torch


def sample_distinct(
    count: int, total: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return `count` different numbers below `total`, ascending, all sets equally likely.

    Cost: O(count log count), unless more than half of all numbers are drawn, then O(total).

    >>> sample_distinct(3, 3).tolist()
    [0, 1, 2]
    """
    if count > total // 2:
        return torch.randperm(total, generator=generator)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        more = torch.randint(total, (count - len(drawn),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()  # type: ignore[no-untyped-call]
    return drawn


def sample_free(
    count: int, taken: torch.Tensor, total: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return `count` different numbers below `total` that are not taken, ascending.

    Args:
        count: at most total - len(taken).
        taken: ascending.
        total: how many numbers there are.
        generator: of random numbers.

    >>> sample_free(2, torch.tensor([0, 2]), 4).tolist()
    [1, 3]
    """
    ranks = sample_distinct(count, total - len(taken), generator)
    # The free number of rank r has r free ones before it, and those taken of which that is true.
    free_before = taken - torch.arange(len(taken))
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def is_in(numbers: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Whether each number is among others, which ascend."""
    if not len(taken):
        return torch.zeros(len(numbers), dtype=torch.bool)
    place = torch.searchsorted(taken, numbers).clamp_(max=len(taken) - 1)
    return taken[place] == numbers
