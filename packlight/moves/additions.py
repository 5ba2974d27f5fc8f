"""How long gradients take to be added to what has been accumulated."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import nn

from packlight.costs.measure import median_seconds
from packlight.costs.profiler import CallProfiler

# To find out how long a cold gradient takes to be added to: enough to fill caches.
MAX_ACCUMULATED, ACCUMULATED_BYTES = 64, 32 * 2**20


class Additions:
    """Seconds of additions, each measured once.

    Args:
        device: where gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[Any, float] = {}

    def seconds(self, parameter: nn.Parameter, profiler: CallProfiler) -> float:
        """Return how long a gradient takes to be added to what has been accumulated.

        That was last touched a microbatch ago: several stand in for it in turn, so that none of
        them is found in a cache.
        """
        key = (tuple(parameter.shape), parameter.dtype)
        if key not in self._seconds:
            gradient = parameter.new_zeros(parameter.shape)
            num = max(1, min(MAX_ACCUMULATED, ACCUMULATED_BYTES // max(1, gradient.nbytes)))
            accumulated = cycle([torch.ones_like(gradient) for _ in range(num)])
            seconds = median_seconds(lambda: next(accumulated).add_(gradient), self._device)
            name = f"addition {key} to one of {num}"
            self._seconds[key] = profiler.remembered_seconds(name, self._device, seconds)
        return self._seconds[key]
