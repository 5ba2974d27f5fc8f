"""Several pipelines with the same stages, each with its part of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from packlight.moves.microbatch.denominator import Denominator, Measure
from packlight.moves.microbatch.split import LossWeight, loss_weights, measured, weights_of
from packlight.ranks.group import Ranks


class MicrobatchWeights:
    """How much each microbatch's loss counts, so that all add up to the loss of the whole batch.

    Args:
        weight: what the loss divides by.
        data: ranks that have other parts of the batch; None where this pipeline has all of it.
    """

    def __init__(self, weight: LossWeight, data: Ranks | None) -> None:
        self._weight, self._data = weight, data
        # Rows are the same in every step.
        self._is_fixed = weight in ("rows", "sum") or (
            isinstance(weight, Denominator) and not weight.terms
        )
        self._known: list[float] | None = None

    def of(self, parts: Sequence[Any]) -> list[float]:
        """Return the weights of this pipeline's microbatches.

        Raises:
            MicrobatchError: there are no right weights for these parts; on all ranks.
        """
        if self._data is None:
            return loss_weights(self._weight, parts)
        if self._known is None or not self._is_fixed:
            everybody = self._data.gather(lambda: self._measured(parts))
            weights = weights_of(self._weight, [one for of_rank in everybody for one in of_rank])
            first = self._data.rank * len(parts)
            self._known = weights[first : first + len(parts)]
        return self._known

    def _measured(self, parts: Sequence[Any]) -> list[Measure | float]:
        return [measured(self._weight, part) for part in parts]


def add_up_over(ranks: Ranks, parameters: Iterable[nn.Parameter]) -> None:
    """Have gradients be the sums of those of all ranks.

    Args:
        ranks: that have the same parameters.
        parameters: in one order on all ranks; a gradient that is missing is nothing.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        # As it lies, which is dense.
        flat = parameter.grad.as_strided((parameter.numel(),), (1,))
        ranks.wait(ranks.start(flat))
