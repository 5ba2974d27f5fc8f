"""How long kernels take beside the calls that they stand for, measured in turns, remembered.

Plans depend on it, so what was seen first holds, in later processes, too.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from packlight.costs.cache import Cache
from packlight.costs.made_up import constant, made_up
from packlight.costs.measure import call_signature, real_tensors
from packlight.kernels.kernel import Kernel, Region

MOST_ROUNDS = 9
ENOUGH_SECONDS = 0.2

# What is called, with what: fake tensors among its arguments.
Call = tuple[Callable[..., Any], Any, Any]


class Verdicts:
    """Ratios of kernels' times to those of the calls that they stand for.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, Cache("fused", device)

    def shares(
        self, kernels: Sequence[tuple[Kernel, Region]], calls: Sequence[Any]
    ) -> list[float]:
        """Return how long each of some kernels takes, as a share of what their calls take alone.

        Args:
            kernels: with what they compute.
            calls: (operator, args, kwargs) that all of them together stand for.
        """
        lines = [*(region.name for _, region in kernels), *(call_signature(*c) for c in calls)]
        key = "v" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
        if key not in self._known:
            fused: list[Call] = [(kernel.call, r.inputs, {}) for kernel, r in kernels]
            with real_tensors():
                least = self._least_seconds([*fused, *calls])
            total = sum(least[len(kernels):])
            self._known[key] = [seconds / total for seconds in least[: len(kernels)]]
        return [float(share) for share in self._known[key]]

    def save(self) -> None:
        """Remember them."""
        self._known.save()

    def _least_seconds(self, calls: Sequence[Call]) -> list[float]:
        given = [made_up(args, kwargs, constant(0), random=True) for _, args, kwargs in calls]
        least = [float("inf")] * len(calls)
        begin = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            for place, ((target, _, _), (args, kwargs)) in enumerate(
                zip(calls, given, strict=True)
            ):
                seconds = self._seconds(target, args, kwargs)
                if turn:  # the first one sets up
                    least[place] = min(least[place], seconds)
            if turn and time.perf_counter() - begin > ENOUGH_SECONDS:
                break
        return least

    def _seconds(self, target: Callable[..., Any], args: Any, kwargs: Any) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        target(*args, **kwargs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start
