"""Trials that have not ended: before they were planned, waiting for room, at work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from packlight.trials.messages import Planned
from packlight.trials.packing import Option

if TYPE_CHECKING:
    import optuna


@dataclass
class Pending:
    """A trial that has not ended.

    Attributes:
        trial: Optuna's.
        options: the ways in which it may run; None before it was planned.
        num_passed: how many later ones have started before it.
        point: what its space returned, if it was asked.
    """

    trial: optuna.Trial
    options: tuple[Option, ...] | None = None
    num_passed: int = 0
    point: dict[str, Any] = field(default_factory=dict)


@dataclass
class Active:
    """A process that plans or trains.

    Attributes:
        pending: its trial.
        held_bytes: what was set aside for its step.
        seconds: how long it is expected to take from `since` on.
        is_admitted: whether it trains as soon as it is planned.
        planned: what its process found out.
    """

    pending: Pending
    held_bytes: int
    seconds: float
    since: float
    is_admitted: bool
    planned: Planned | None = None

    def remaining(self, now: float) -> Option:
        """What it takes of the strip from now on."""
        return Option(self.held_bytes, max(1e-3, self.seconds - (now - self.since)))
