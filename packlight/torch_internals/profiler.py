"""What torch's profiler saw."""

from __future__ import annotations

from typing import Any

import torch


def is_profiled() -> bool:
    """Whether a profiler runs: a second one cannot."""
    from torch._C import _autograd

    return bool(_autograd._profiler_enabled())


def memory_events(profiler: Any) -> list[int]:
    """Return every allocation (+bytes) and free (-bytes) on the CPU while a profiler ran, in order.

    Relied upon: events named "[memory]", those of kernels' own temporaries included.
    """
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    events.sort(key=lambda event: event[0])
    return [num_bytes for _, num_bytes in events]
