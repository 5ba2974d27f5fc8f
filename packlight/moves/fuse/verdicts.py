"""How long a kernel takes beside the calls that it stands for, measured in turns, remembered.

Plans depend on it, so what was seen first holds, in later processes, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from packlight.costs.cache import Cache
from packlight.costs.made_up import constant, made_up
from packlight.costs.measure import real_tensors
from packlight.kernels.kernel import Kernel, Region

MOST_ROUNDS = 9
ENOUGH_SECONDS = 0.2


class Verdicts:
    """Ratios of kernels' times to those of the calls that they stand for.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, Cache("fused", device)

    def relative_seconds(self, kernel: Kernel, region: Region) -> float:
        """Return how many times as long as its calls one by one a kernel takes."""
        if region.name not in self._known:
            with real_tensors():
                self._known[region.name] = self._seen(kernel, region)
        return float(self._known[region.name])

    def save(self) -> None:
        """Remember them."""
        self._known.save()

    def _seen(self, kernel: Kernel, region: Region) -> float:
        inputs, _ = made_up(region.inputs, {}, constant(0), random=True)
        ways: tuple[Callable[..., Any], ...] = (kernel.call, region.graph)
        least = [float("inf"), float("inf")]
        begin = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            for place, way in enumerate(ways):
                seconds = self._seconds(way, inputs)
                if turn:  # the first one sets up
                    least[place] = min(least[place], seconds)
            if turn and time.perf_counter() - begin > ENOUGH_SECONDS:
                break
        return least[0] / least[1]

    def _seconds(self, way: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        way(*inputs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start
