"""What ranks say together of all gradients, of which each of them has parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from packlight.ranks.group import Ranks


class Together:
    """Looks at the gradients of all ranks.

    Args:
        ranks: all of them.
        counts: whether this rank's gradient of a parameter counts; where others have the same, one
            of them counts.
    """

    def __init__(self, ranks: Ranks, counts: Callable[[nn.Parameter], bool]) -> None:
        self._ranks, self._counts = ranks, counts

    def norm(self, gradients: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> float:
        """Return the norm of the gradients of all ranks, the same on all of them."""
        squares = 0.0
        for parameter, gradient in gradients:
            if self._counts(parameter):
                norm = float(torch.linalg.vector_norm(gradient))
                squares += norm * norm
        return math.sqrt(sum(theirs for (theirs,) in self._ranks.exchange_numbers([squares])))

    def is_on_any(self, flag: bool) -> bool:
        """Return whether something is so on any rank."""
        return any(self._ranks.exchange(int(flag)))
