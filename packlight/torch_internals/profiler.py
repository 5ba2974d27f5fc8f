"""What torch's profiler sees of the allocator."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd import profiler


def is_profiled() -> bool:
    """Whether a profiler runs: a second one cannot."""
    from torch._C import _autograd

    return bool(_autograd._profiler_enabled())


class AllocationLog:
    """Every allocation and free on the CPU from its making until `stop`, and nothing else.

    A profiler that also sees calls, and is stopped while one of them runs, leaves behind a record
    that this call still writes to if another profiler runs when it ends, whoever owns that memory
    by then. So it is told to look at none.

    Relied upon: `_enable_profiler` takes the kinds of calls to look at, of which one is never made
    here; memory is watched all the same. Events of it are named "[memory]", those of kernels' own
    temporaries included.

    Cost: 6 to 8% of time.
    """

    def __init__(self) -> None:
        from torch._C import _autograd, _profiler

        self._profiler: Any = _autograd
        # The profiler's library prints a line at each start unless told otherwise before.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        settings: Any = profiler.profile(profile_memory=True, use_kineto=True)
        config, activities = settings.config(create_trace_id=True), settings.kineto_activities
        self._profiler._prepare_profiler(config, activities)
        never = {_profiler.RecordScope.LITE_INTERPRETER}
        self._profiler._enable_profiler(config, activities, never)

    def stop(self) -> list[int]:
        """Watch no more; return allocations (+bytes) and frees (-bytes) in order."""
        events = [
            (event.start_ns(), event.nbytes())
            for event in self._profiler._disable_profiler().events()
            if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
        ]
        events.sort(key=lambda event: event[0])
        return [num_bytes for _, num_bytes in events]
