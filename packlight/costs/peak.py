"""The exact peak of the allocator while a function runs.

On CPU the profiler's memory events name every allocation and free of torch's allocator, kernels'
own temporaries included, so their running sum is exact. CUDA's caching allocator counts itself.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from packlight.torch_internals.profiler import AllocationLog


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """What a function allocated.

    Attributes:
        peak_bytes: the most that torch's allocator held at once above what it held at the start.
        end_bytes: what it held above the start when the function returned.
        resident_high_water_bytes: the process's resident-set high-water mark since it started
            (CPU; includes everything, never falls), or None where the system does not tell.
        result: what the function returned.
    """

    peak_bytes: int
    end_bytes: int
    resident_high_water_bytes: int | None
    result: Any


def measure_peak(fn: Callable[[], Any], device: torch.device | str | None = None) -> MemoryPeak:
    """Run `fn()` and return the allocator's exact peak above where it started.

    Args:
        fn: called once, without arguments.
        device: whose allocator to watch; the CPU's by default.

    Cost: 6 to 8% of time on CPU, none on CUDA.

    >>> measure_peak(lambda: torch.ones(256) + torch.ones(256)).peak_bytes
    3072
    """
    gc.collect()  # what earlier calls left in reference cycles must not be freed inside this one
    result, peak, end = allocator_peak(fn, torch.device(device or "cpu"))
    return MemoryPeak(peak, end, _resident_high_water_bytes(), result)


def allocator_peak(fn: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """Run `fn()`; return its result, the allocator's peak and its end, both above the start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return result, peak, torch.cuda.memory_allocated(device) - before
    result, events = record_allocations(fn)
    return result, *running_peak(events)


def record_allocations(fn: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Run `fn()`; return its result and every CPU allocation (+bytes) and free (-bytes)."""
    log = AllocationLog()
    try:
        result = fn()
    finally:
        events = log.stop()
    return result, events


def running_peak(events: list[int]) -> tuple[int, int]:
    """Return the highest and the last value of the running sum of allocations and frees.

    >>> running_peak([100, 50, -100, 20])
    (150, 70)
    """
    live = peak = 0
    for num_bytes in events:
        live += num_bytes
        peak = max(peak, live)
    return peak, live


def _resident_high_water_bytes() -> int | None:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024 if kibibytes > 0 else None
