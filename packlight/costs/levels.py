"""What the allocator holds at marks that are set while something runs, and the most between them.

As in peak.py: on the CPU the profiler's memory events tell, on CUDA the allocator's own counters. A
mark on the CPU is a few allocations of odd sizes, which are found again among the events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from packlight.torch_internals.profiler import AllocationLog, is_profiled

# Allocated and freed one after the other: nobody else does that.
MARK_BYTES = (61, 67, 71, 61)


@dataclass(frozen=True, slots=True)
class Level:
    """What was held, in bytes above the start.

    Attributes:
        at_bytes: at the mark.
        peak_bytes: the most since the mark before.
    """

    at_bytes: int
    peak_bytes: int


class LevelRecorder:
    """Watches an allocator from its making until `stop`.

    Args:
        device: whose allocator.

    Cost: on the CPU 6 to 8% of time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: list[Level] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._start = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._log = AllocationLog()

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        """Whether nobody else profiles, which excludes another profiler on the CPU."""
        return device.type == "cuda" or not is_profiled()

    def mark(self) -> None:
        """Set a mark."""
        if self._device.type == "cuda":
            at = torch.cuda.memory_allocated(self._device) - self._start
            peak = torch.cuda.max_memory_allocated(self._device) - self._start
            self._levels.append(Level(at, peak))
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        for size in MARK_BYTES:
            torch.empty(size, dtype=torch.uint8, device="cpu")

    def stop(self) -> list[Level]:
        """Return the level at each mark."""
        if self._device.type == "cuda":
            return self._levels
        return levels_at_marks(self._log.stop())


def levels_at_marks(events: list[int]) -> list[Level]:
    """Return the levels at the marks among allocations and frees.

    >>> mark = [61, -61, 67, -67, 71, -71, 61, -61]
    >>> levels_at_marks([100, *mark, 50, -70, *mark])
    [Level(at_bytes=100, peak_bytes=100), Level(at_bytes=80, peak_bytes=150)]
    """
    mark = [change for size in MARK_BYTES for change in (size, -size)]
    found: list[Level] = []
    live = peak = place = 0
    while place < len(events):
        if events[place : place + len(mark)] == mark:
            found.append(Level(live, peak))
            peak, place = live, place + len(mark)
            continue
        live += events[place]
        peak = max(peak, live)
        place += 1
    return found
