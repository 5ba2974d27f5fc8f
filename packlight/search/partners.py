"""What the search asks of other ranks, where there are any."""

from __future__ import annotations

from typing import Protocol

from packlight.capture.whole_step import WholeStep
from packlight.moves.move import Move
from packlight.step import Schedule


class Partners(Protocol):
    """Other ranks that see the same steps."""

    def observe(self, moves: tuple[Move, ...], size: int | None) -> None:
        """Have the profiler know what calls cost on the slowest rank.

        Args:
            moves: that shape the step.
            size: rows of the microbatch; None for the whole batch.
        """

    def rehearse(
        self, moves: tuple[Move, ...], size: int | None, step: WholeStep, schedule: Schedule
    ) -> dict[int, float]:
        """Return seconds of operations inside a step, on the slowest rank."""
