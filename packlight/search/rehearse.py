"""Times of operations inside the step: the planned graphs are run a few times, call by call.

In isolation a call finds its inputs in the cache and its memory mapped; in the step it does not,
and memory-bound calls take several times as long. So a step is rehearsed on its real inputs, with a
clock around each call. Nothing that the user can see changes: captured graphs do not write to their
inputs, generators are put back, results are dropped. A rehearsal needs no more memory than the
schedule.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from packlight.capture.joint import JointStep
from packlight.costs.measure import call_signature, real_tensors
from packlight.costs.profiler import CallProfiler
from packlight.lower.frame import Frame
from packlight.lower.program import OPERATION_KEY, IgnoredEvents, Program

NUM_REHEARSALS = 3
# Long steps are rehearsed once: what disturbs them, and memory that is new at first,
# takes a smaller part of them.
ENOUGH_SECONDS = 1.5
MEMORY_FRACTION = 0.8


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory the device could still give, or None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def fits(peak_bytes: int, device: torch.device) -> bool:
    """Whether a schedule can be rehearsed without bringing the machine into need."""
    free = available_bytes(device)
    return free is None or peak_bytes <= MEMORY_FRACTION * free


def rehearse(
    program: Program, primals: list[Any], tangents: list[torch.Tensor], device: torch.device
) -> dict[int, float]:
    """Return the least seconds of each operation over several runs; nothing is updated.

    What disturbs a call (other processes, memory that is new at first) only adds to its time.

    Args:
        program: of a schedule without transfers.
        primals: real inputs of the forward, in order.
        tangents: (fake) gradients that the backward starts from; ones are used.
        device: where the step runs.
    """
    samples: dict[int, list[float]] = defaultdict(list)
    start = time.perf_counter()
    with real_tensors():
        ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in tangents]
        for _ in range(NUM_REHEARSALS):
            clock = _Clock(device)
            _run_once(program, primals, ones, clock)
            for operation, seconds in clock.read():
                samples[operation].append(seconds)
            if time.perf_counter() - start > ENOUGH_SECONDS:
                break
    return {operation: min(seconds) for operation, seconds in samples.items()}


def _run_once(
    program: Program, primals: list[Any], tangents: list[torch.Tensor], clock: _Clock
) -> None:
    def timed(module: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
        results: Sequence[Any] = _TimedRun(module, clock).boxed_run(arguments)
        return results

    frame = Frame(program, {"events": IgnoredEvents()}, timed)
    for index, section in enumerate(program.sections):
        frame.run([*(primals if index == 0 else ()), *(tangents if section.takes_tangents else ())])


def typical_seconds(step: JointStep, seconds: dict[int, float]) -> dict[int, float]:
    """Return times of operations in which equal calls have the same, their median."""
    by_call: dict[str, list[int]] = {}
    for index in seconds:
        by_call.setdefault(call_signature(*step.call(index)), []).append(index)
    typical = dict(seconds)
    for indices in by_call.values():
        typical.update(dict.fromkeys(indices, statistics.median(seconds[i] for i in indices)))
    return typical


def with_estimated_seconds(step: JointStep, profiler: CallProfiler) -> JointStep:
    """Return a step in which calls never seen inside a step take as much longer there as others."""
    return step.with_seconds({
        index: profiler.estimated_in_step(step.call(index)[0], facts.seconds)
        for index, facts in enumerate(step.facts)
        if facts is not None and facts.in_step_seconds is None
    })


class _Clock:
    """Collects the duration of each call; reads device clocks only at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[int, Any, Any]] = []

    def now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def read(self) -> list[tuple[int, float]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [(i, start.elapsed_time(end) / 1e3) for i, start, end in self.marks]
        return [(i, end - start) for i, start, end in self.marks]


class _TimedRun(fx.Interpreter):
    """Runs a graph call by call, each value dropped after its last use, with a clock."""

    def __init__(self, module: fx.GraphModule, clock: _Clock) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.clock = clock

    def run_node(self, n: fx.Node) -> Any:
        start = self.clock.now()
        result = super().run_node(n)
        operation = n.meta.get(OPERATION_KEY)
        if operation is not None:
            self.clock.marks.append((operation, start, self.clock.now()))
        # What nobody uses, generated code drops at once, and `Interpreter` never.
        return result if n.users or n.op == "output" else None
