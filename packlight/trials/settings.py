"""What a study is asked for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from packlight.errors import OptionError

PRUNERS = ("none", "median", "halving")


@dataclass(frozen=True)
class Settings:
    """How the trials of a study run; a study that is resumed has to have the same.

    Attributes:
        steps: of training in a trial.
        report_every: steps between two looks at the validation error, at which a trial may be
            pruned.
        seed: of every trial's model, batches and dropout, and of the sampler.
        pruner: "none", "median" (worse than the median of earlier trials at the same step) or
            "halving" (asynchronous successive halving: Li et al. 2018, arXiv 1810.05934).
        threads: of torch in each worker; bits may depend on it.
        exact: plan with moves only that keep every bit, so that a trial's losses do not depend on
            what it shares the memory with.
        allow: approximate techniques that every trial may use.
        device: "cpu"; the limit is the kernel's, on a process's memory.
    """

    steps: int = 100
    report_every: int = 0
    seed: int = 0
    pruner: str = "none"
    threads: int = 1
    exact: bool = True
    allow: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.pruner not in PRUNERS:
            raise OptionError(
                f"pruner {self.pruner!r} is not known\nhint: known are {', '.join(PRUNERS)}"
            )
        if self.steps < 1 or self.threads < 1 or self.report_every < 0:
            raise OptionError("steps and threads are positive, and report_every is not negative")
        if self.pruner != "none" and not 0 < self.report_every < self.steps:
            raise OptionError(
                f"pruner {self.pruner!r} decides where a trial reports, and with report_every="
                f"{self.report_every} none does before its end\n"
                f"hint: report_every={max(1, self.steps // 10)} reports ten times"
            )

    @property
    def reported_steps(self) -> tuple[int, ...]:
        """After which steps the validation error is looked at; always after the last."""
        every = self.report_every or self.steps
        return (*range(every, self.steps, every), self.steps)


def default_threads(num_workers: int) -> int:
    """Return how many threads each of some workers has if they share this machine."""
    return max(1, math.floor((os.cpu_count() or 1) / num_workers))


def as_json(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values, to compare and to store."""
    return {**vars(settings), "allow": list(settings.allow)}
