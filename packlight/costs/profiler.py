"""Observes each distinct call of a step once, with progress, through the disk cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from packlight.costs.cache import CallCache
from packlight.costs.made_up import tensor_arguments
from packlight.costs.measure import CallFacts, call_signature, observe_call


@dataclass(frozen=True)
class Known:
    """What was seen of calls, by signature, and seconds of what is no call, by name."""

    calls: dict[str, CallFacts]
    others: dict[str, float]


class CallProfiler:
    """Use as a context manager: facts are written to the disk cache when it closes.

    Args:
        progress: show a line while calls are being measured (on a terminal only).
    """

    def __init__(self, progress: bool = True) -> None:
        self._caches: dict[torch.device, CallCache] = {}
        self._known: dict[str, CallFacts] = {}
        self._agreed_seconds: dict[str, float] = {}
        # Per operator: seconds inside steps, and of the same calls alone.
        self._in_steps: dict[str, list[float]] = {}
        self._expected: dict[str, float] = {}
        self.num_measured = 0
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("profiling operations: {task.completed:.0f} measured"),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        )
        self._task = self._progress.add_task("profile", total=None)

    def __enter__(self) -> CallProfiler:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for cache in self._caches.values():
            cache.save()

    def measure(self, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> CallFacts:
        """Return the facts of a call, from memory, from disk, or by running it."""
        signature = call_signature(target, args, kwargs)
        if signature not in self._known:
            cache = self._cache(args, kwargs)
            facts = cache.get(signature)
            if facts is None:
                facts = observe_call(target, args, kwargs)
                cache.put(signature, facts)
                self.num_measured += 1
                self._progress.update(self._task, completed=self.num_measured)
            self._known[signature] = facts
            self._count_in_steps(target, facts)
        return self._known[signature]

    def is_known(self, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> bool:
        """Whether a call need not be run for `measure`."""
        signature = call_signature(target, args, kwargs)
        return signature in self._known or self._cache(args, kwargs).get(signature) is not None

    @property
    def has_seen_steps(self) -> bool:
        """Whether times of any call inside a step are known."""
        return bool(self._in_steps)

    def estimated_in_step(self, target: torch._ops.OpOverload, seconds: float) -> float:
        """Return how long a call may take inside a step that takes some time alone.

        The ratio is that of the operator's other calls, else of all calls; what was expected of the
        operator (`expect_in_step`) comes first.
        """
        if str(target) in self._expected:
            return self._expected[str(target)]
        known = self._in_steps.get(str(target)) or [
            sum(pair[place] for pair in self._in_steps.values()) for place in range(2)
        ]
        return seconds * known[0] / known[1] if known[1] else seconds

    def expect_in_step(self, target: torch._ops.OpOverload, seconds: float) -> None:
        """Have an operator, whose calls are all alike, estimated by what is known of it.

        Args:
            target: what stands for several calls that were seen in steps.
            seconds: how long it may take in one.
        """
        self._expected[str(target)] = seconds

    def _count_in_steps(self, target: torch._ops.OpOverload, facts: CallFacts) -> None:
        if facts.in_step_seconds is not None:
            total = self._in_steps.setdefault(str(target), [0.0, 0.0])
            total[0] += facts.in_step_seconds
            total[1] += facts.seconds

    def remembered_seconds(self, name: str, device: torch.device, seconds: float) -> float:
        """Return how long something that is no call was once seen to take on a device.

        Plans depend on it: what was seen first is kept, on disk, so that they can be made again.

        Args:
            name: tells it from everything else.
            device: where it was seen.
            seconds: what was seen now.
        """
        if name in self._agreed_seconds:
            return self._agreed_seconds[name]
        cache = self._cache_of(device)
        known = cache.get(name)
        if known is None:
            known = CallFacts(seconds, 0, (), None)
            cache.put(name, known)
        self._agreed_seconds[name] = known.seconds
        return known.seconds

    # -- what several processes know together

    @property
    def known(self) -> Known:
        """All that was asked for so far."""
        return Known(dict(self._known), dict(self._agreed_seconds))

    def take(self, known: Known) -> None:
        """Answer with what several processes agreed on; this device's own facts stay on disk."""
        self._known.update(known.calls)
        self._agreed_seconds.update(known.others)

    def note_in_step(
        self, target: torch._ops.OpOverload, args: Any, kwargs: Any, seconds: float
    ) -> None:
        """Remember how long a call takes inside a training step."""
        signature = call_signature(target, args, kwargs)
        facts = replace(self._known[signature], in_step_seconds=seconds)
        self._count_in_steps(target, facts)
        if facts != self._known[signature]:
            self._known[signature] = facts
            self._cache(args, kwargs).put(signature, facts)

    def _cache(self, args: Any, kwargs: Any) -> CallCache:
        devices = [t.device for t in tensor_arguments(args, kwargs)]
        return self._cache_of(next((d for d in devices if d.type != "cpu"), torch.device("cpu")))

    def _cache_of(self, device: torch.device) -> CallCache:
        if device not in self._caches:
            self._caches[device] = CallCache(device)
        return self._caches[device]
