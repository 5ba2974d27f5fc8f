"""What a trial's process and the study tell each other, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """What a process of a trial is started for.

    Attributes:
        number: the trial's.
        step_bytes: what its step may hold; planned for that, and enforced.
        slack_bytes: what the process may hold beside: objects of capture and planning.
        result_path: where the process writes how the trial ended.
    """

    number: int
    step_bytes: int
    slack_bytes: int
    result_path: str


@dataclass(frozen=True)
class Planned:
    """What is known of a trial before it runs.

    Attributes:
        peak_bytes: everything that its step holds, and evaluation and batches beside it.
        step_peak_bytes: of that, the planned peak of the training step.
        seconds: predicted, for all its steps.
        plain_peak_bytes: of the step without a limit; None if it is not known.
        plain_seconds: predicted, of all its steps without a limit.
        budget_bytes: that it was planned for.
        planning_seconds: how long capture and planning took.
    """

    peak_bytes: int
    step_peak_bytes: int
    seconds: float
    plain_peak_bytes: int | None
    plain_seconds: float
    budget_bytes: int
    planning_seconds: float

    @property
    def slowdown(self) -> float:
        """What fitting costs, 1 for nothing."""
        return self.seconds / self.plain_seconds if self.plain_seconds else 1.0


@dataclass(frozen=True)
class Ask:
    """A call of the trial, such as `suggest_float`, to be answered."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """The trial's values, as `space` returned them."""

    values: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The validation error after a step."""

    step: int
    error: float


@dataclass(frozen=True)
class TooSmall:
    """The step does not fit in what its process was given; nothing is written.

    Attributes:
        smallest_bytes: with which it would, batches beside it included.
        why: in words.
    """

    smallest_bytes: int
    why: str


@dataclass(frozen=True)
class Ended:
    """The result is written."""


@dataclass(frozen=True)
class Refused:
    """The FILE or its space cannot be searched at all; the text says why."""

    text: str


@dataclass(frozen=True)
class OutOfMemory:
    """The kernel gave no more memory: nothing is written; it is tried again with more."""

    text: str


@dataclass(frozen=True)
class Reply:
    """What the study answers.

    Attributes:
        value: of what was asked.
        error: why it has none.
        goes_on: False: the process is to end, or the trial to be pruned.
    """

    value: Any = None
    error: str = ""
    goes_on: bool = True
