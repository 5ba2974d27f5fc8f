"""A tier for each of several runs of a program that are in flight at once.

Who runs a program's backward may be somebody who knows nothing of tiers: autograd, which keeps
tensors between a forward and its backward, and lets go of them when the graph dies. So a run is
known by a token, a tensor that is kept among the others. While anybody has the token's memory, the
run's values stay in its tier; afterwards the tier serves another run. A graph whose backward never
runs gives its tier back as well, and a retained graph keeps it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Self

import numpy as np
import torch

from packlight.errors import OffloadError
from packlight.memory.tier import Tier


class TierPool:
    """Tiers, as many as there are runs in flight at once.

    Args:
        make_tier: makes one.
    """

    def __init__(self, make_tier: Callable[[], Tier]) -> None:
        self._make_tier = make_tier
        self._numbers = itertools.count()
        # Both change in finalizers, that is at any moment: by one operation at a time.
        self._in_flight: dict[int, Tier] = {}
        self._idle: list[Tier] = []

    @property
    def num_tiers(self) -> int:
        """How many were made so far."""
        return len(self._in_flight) + len(self._idle)

    @property
    def num_in_flight(self) -> int:
        """How many runs are not over."""
        return len(self._in_flight)

    def open(self) -> torch.Tensor:
        """Begin a run and return its token, which must live as long as the run's values.

        Raises:
            OffloadError: another tier is needed and cannot be made.
        """
        tier, number = self._idle_tier(), next(self._numbers)
        self._in_flight[number] = tier
        memory = np.array([number])
        weakref.finalize(memory, self._end, number).atexit = False
        return torch.from_numpy(memory)

    def tier_of(self, token: torch.Tensor) -> Tier:
        """Return the tier of a run.

        Raises:
            OffloadError: the token is a copy, and the run's values are gone.
        """
        tier = self._in_flight.get(int(token))
        if tier is None:
            raise OffloadError(
                "what the forward has offloaded is gone before the backward fetches it",
                hint="saved-tensor hooks that copy what autograd saves (save_on_cpu) cannot be "
                "used with offload_directory=",
            )
        return tier

    def _idle_tier(self) -> Tier:
        try:
            tier = self._idle.pop()
        except IndexError:
            return self._make_tier()
        try:
            tier.wait_all()  # for what a run has left that was given up
        except OffloadError:
            tier.reset()
        return tier

    def _end(self, number: int) -> None:
        self._idle.append(self._in_flight.pop(number))

    def __deepcopy__(self, memo: object) -> Self:
        return self  # copies of generated code run the same program
