"""Times of calls inside the pieces of a step, seen while that is recorded: a free rehearsal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from packlight.capture.joint import JointStep
from packlight.costs.measure import call_signature
from packlight.costs.profiler import CallProfiler
from packlight.search.rehearse import Clock, TimedRun


class PieceTimes:
    """Runs sections of pieces call by call, with a clock around each call.

    Args:
        device: where they run.
        profiler: knows the calls, and remembers their times.
    """

    def __init__(self, device: torch.device, profiler: CallProfiler) -> None:
        self._device, self.profiler = device, profiler
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def caller(self, step: JointStep) -> Callable[[fx.GraphModule, list[Any]], Sequence[Any]]:
        """Return what runs generated code of a piece."""

        def call(module: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
            clock = Clock(self._device, _Calls(step, self._seconds))
            results: Sequence[Any] = TimedRun(module, clock).boxed_run(arguments)
            clock.read()
            return results

        return call

    def timed(self, step: JointStep) -> JointStep:
        """Return a piece with the times that were seen, equal calls having the same."""
        seconds: dict[int, float] = {}
        for index, facts in enumerate(step.facts):
            if facts is None or facts.in_step_seconds is not None:
                continue
            call = step.call(index)
            seen = self._seconds.get(call_signature(*call))
            if seen:
                seconds[index] = statistics.median(seen)
                self.profiler.measure(*call)  # it knows them from the disk
                self.profiler.note_in_step(*call, seconds[index])
        timed = step.with_seconds(seconds)
        facts_now = [
            f if f is None or i not in seconds else replace(f, in_step_seconds=seconds[i])
            for i, f in enumerate(step.facts)
        ]
        return replace(timed, facts=facts_now)


class _Calls:
    """The calls of one section: all of them run and are timed."""

    def __init__(self, step: JointStep, seconds: dict[str, list[float]]) -> None:
        self._step, self._seconds = step, seconds

    def is_timed(self, operation: int) -> bool:
        return self._step.facts[operation] is not None

    def is_left_out(self, operation: int) -> bool:
        return False

    def stand_in(self, operation: int) -> Any:
        raise AssertionError("no call is left out")

    def note(self, operation: int, seconds: float) -> None:
        self._seconds[call_signature(*self._step.call(operation))].append(seconds)
