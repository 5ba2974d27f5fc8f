"""Times of operations inside the step: the planned graphs are run a few times, call by call.

In isolation a call finds its inputs in the cache and its memory mapped; in the step it does not,
and memory-bound calls take several times as long. So a step is rehearsed on its real inputs, with a
clock around each call. Equal calls take equally long: of those of many equal layers a few
run, and tensors like their results stand in for those of the others.

Nothing that the user can see changes: captured graphs do not write to their inputs, generators are
put back, results are dropped. A rehearsal needs no more memory than the schedule.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.joint import JointStep
from packlight.costs.measure import call_signature, real_tensors
from packlight.costs.profiler import CallProfiler
from packlight.lower.frame import Frame
from packlight.lower.program import (
    OPERATION_KEY,
    IgnoredEvents,
    IgnoredReductions,
    Program,
)
from packlight.torch_internals.dispatch import is_fake

NUM_REHEARSALS = 3
# Long steps are rehearsed once: what disturbs them takes a smaller part of them.
ENOUGH_SECONDS = 1.5
# Of equal calls, in however many layers, so many run.
ENOUGH_TIMES = 5
MEMORY_FRACTION = 0.8
# Calls seen before tell how fast the machine is if they are so much of a step.
MOSTLY_KNOWN = 0.5


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
    step: JointStep,
    program: Program,
    primals: list[Any],
    tangents: list[torch.Tensor],
    device: torch.device,
) -> dict[int, float]:
    """Return seconds of a step's operations, equal calls having the same; nothing is updated.

    What disturbs a call (another process, a stalled thread) only ever adds to its time: of several
    runs of an operation the least counts, and of equal calls the median of those.

    Args:
        step: whose schedule it is.
        program: of a schedule without transfers.
        primals: real inputs of the forward, in order.
        tangents: (fake) gradients that the backward starts from; ones are used.
        device: where the step runs.
    """
    calls = _Calls(step)
    clock = Clock(device, calls)
    with real_tensors():
        ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in tangents]
        _run_once(program, primals, ones, clock)  # makes room: the heap is as large as it will be
        calls.are_timed = True
        start = time.perf_counter()
        for _ in range(NUM_REHEARSALS):
            _run_once(program, primals, ones, clock)
            clock.read()
            if time.perf_counter() - start > ENOUGH_SECONDS:
                break
    return calls.seconds()


def _run_once(
    program: Program, primals: list[Any], tangents: list[torch.Tensor], clock: Clock
) -> None:
    def timed(module: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
        results: Sequence[Any] = TimedRun(module, clock).boxed_run(arguments)
        return results

    helpers = {"events": IgnoredEvents(), "reducer": IgnoredReductions()}
    frame = Frame(program, helpers, timed)
    for index, section in enumerate(program.sections):
        frame.run([*(primals if index == 0 else ()), *(tangents if section.takes_tangents else ())])


def with_estimated_seconds(step: JointStep, profiler: CallProfiler) -> JointStep:
    """Return a step in which calls never seen inside a step take as much longer there as others."""
    return step.with_seconds({
        index: profiler.estimated_in_step(step.call(index)[0], facts.seconds)
        for index, facts in enumerate(step.facts)
        if facts is not None and facts.in_step_seconds is None
    })


def in_known_terms(step: JointStep, seconds: dict[int, float]) -> dict[int, float]:
    """Return rehearsed seconds as they would have been when most of the step was seen before.

    A machine is faster at one time than at another, by more than what ways to run a step differ in.
    So calls that were seen in other steps keep their seconds, and say how fast the machine is now.

    Args:
        step: with what was known of its calls.
        seconds: of its operations, rehearsed now.
    """
    known = {
        index: facts.in_step_seconds for index, facts in enumerate(step.facts)
        if facts is not None and facts.in_step_seconds is not None and index in seconds
    }
    now = sum(seconds[index] for index in known)
    if now < MOSTLY_KNOWN * sum(seconds.values()):
        return seconds
    scale = sum(known.values()) / now
    return {index: known.get(index, value * scale) for index, value in seconds.items()}


class _Calls:
    """The calls of a step's operations: which are equal, how long they took, what they return.

    Attributes:
        are_timed: False as long as all calls that may be left out are.
    """

    def __init__(self, step: JointStep) -> None:
        self._step = step
        self._equal: dict[str, list[int]] = defaultdict(list)
        for index, facts in enumerate(step.facts):
            if facts is not None:
                self._equal[call_signature(*step.call(index))].append(index)
        # From all over the step: what runs first finds memory that is new.
        self._chosen = {
            operation
            for equal in self._equal.values()
            for operation in equal[:: -(-len(equal) // ENOUGH_TIMES)]
        }
        self._samples: dict[int, list[float]] = defaultdict(list)
        self.are_timed = False

    def is_timed(self, operation: int) -> bool:
        """Whether the duration of a call is of interest."""
        return self.are_timed and operation in self._chosen

    def is_left_out(self, operation: int) -> bool:
        """Whether others are timed instead of a call, and floats can stand in for its results."""
        if self._step.facts[operation] is None:  # it asserts something of what is made up here
            return self._result(operation) is None
        if self.is_timed(operation):
            return False
        return all(
            leaf is None or (isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
            for leaf in pytree.tree_leaves(self._result(operation))
        )

    def stand_in(self, operation: int) -> Any:
        """Return tensors like those that a call returns."""

        def like(fake: torch.Tensor) -> torch.Tensor:
            empty = torch.empty_strided(
                fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device
            )
            return empty.fill_(0.5)

        return pytree.tree_map_only(torch.Tensor, like, self._result(operation))

    def _result(self, operation: int) -> Any:
        return self._step.node_of_operation[operation].meta.get("val")

    def note(self, operation: int, seconds: float) -> None:
        """Remember how long a call took."""
        self._samples[operation].append(seconds)

    def seconds(self) -> dict[int, float]:
        """Return seconds of all calls of which an equal one was timed."""
        found: dict[int, float] = {}
        for equal in self._equal.values():
            least = [min(self._samples[o]) for o in equal if self._samples.get(o)]
            if least:
                found.update(dict.fromkeys(equal, statistics.median(least)))
        return found


class TimedCalls(Protocol):
    """Says of the calls of a step what to do with each, and hears how long it took."""

    def is_timed(self, operation: int) -> bool:
        """Whether the duration of a call is of interest."""

    def is_left_out(self, operation: int) -> bool:
        """Whether tensors like its results stand in for a call."""

    def stand_in(self, operation: int) -> Any:
        """Return tensors like those that a call returns."""

    def note(self, operation: int, seconds: float) -> None:
        """Remember how long a call took."""


class Clock:
    """Collects the duration of each call; reads device clocks only at the end."""

    def __init__(self, device: torch.device, calls: TimedCalls) -> None:
        self.device, self.calls = device, calls
        self.marks: list[tuple[int, Any, Any]] = []

    def now(self) -> Any:
        """Return the time, or an event that will tell it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def read(self) -> None:
        """Tell of all calls since the last time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for operation, start, end in self.marks:
            is_event = self.device.type == "cuda"
            self.calls.note(operation, start.elapsed_time(end) / 1e3 if is_event else end - start)
        self.marks.clear()


class TimedRun(fx.Interpreter):
    """Runs a graph call by call, each value dropped after its last use, with a clock."""

    def __init__(self, module: fx.GraphModule, clock: Clock) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.clock, self.calls = clock, clock.calls

    def run_node(self, n: fx.Node) -> Any:
        """Run one call, with the clock where that is of interest."""
        operation: int | None = n.meta.get(OPERATION_KEY)
        target = n.target
        # A random operation that runs again is no plain call: it puts a generator back before.
        is_plain = isinstance(target, torch._ops.OpOverload)
        if operation is not None and is_plain and self.calls.is_left_out(operation):
            result = self._stand_in(n, operation)
        else:
            start = self.clock.now()
            result = super().run_node(n)
            if operation is not None and self.calls.is_timed(operation):
                self.clock.marks.append((operation, start, self.clock.now()))
        # What nobody uses, generated code drops at once, and `Interpreter` never.
        return result if n.users or n.op == "output" else None

    def _stand_in(self, n: fx.Node, operation: int) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not isinstance(n.target, torch._ops.OpOverload):  # a random call again
            return self.calls.stand_in(operation)
        written = [
            kwargs[a.name] if a.name in kwargs else args[place]
            for place, a in enumerate(n.target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        return written[0] if written else self.calls.stand_in(operation)


def real_inputs(step: JointStep, example_inputs: Sequence[Any]) -> list[Any] | None:
    """Return the real tensors behind the joint graph's primals, or None if they cannot be told."""
    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    found: list[Any] = []
    remaining = iter(tensors)
    for primal in step.primals:
        fake = primal.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            found.append(fake)
            continue
        real = next(remaining, None)
        if (
            real is None
            or is_fake(real)
            or real.shape != fake.shape
            or real.dtype != fake.dtype
            or real.device != fake.device
            or real.stride() != fake.stride()
        ):
            return None
        found.append(real)
    return found
