"""A way to run a training step: moves, schedules, bytes. All of it is data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from packlight.moves.move import ROUNDING_MARGIN, Effect, Move
from packlight.step import Machine, Plan, StepMemory


@dataclass(frozen=True)
class Environment:
    """Where a way was found.

    Attributes:
        torch_version: the kernels are its.
        device_name: the chip and how much of it is used.
    """

    torch_version: str
    device_name: str


@dataclass(frozen=True)
class PartPlan:
    """How (micro)batches of one size run.

    Attributes:
        num_rows: of the microbatch; None for a batch that runs as a whole.
        count: how many there are.
        graph_digest: of the step that the schedule is for.
        plan: its schedule.
        num_offloaded: activations that leave memory in one run of it.
    """

    num_rows: int | None
    count: int
    graph_digest: str
    plan: Plan
    num_offloaded: int = 0


@dataclass(frozen=True)
class Way:
    """One way to run the step.

    Attributes:
        moves: in the order in which they shape the step.
        parts: one, or two where the last microbatches are smaller.
        memory: bytes outside of the schedule.
        environment: where it was found.
        finish_seconds: of the update after the last schedule.
        machine: whose lanes transfers take, if there is one.
        words: what the moves do, where that is to be told.
        not_made: what was not possible -> why.
    """

    moves: tuple[Move, ...]
    parts: tuple[PartPlan, ...]
    memory: StepMemory
    environment: Environment
    finish_seconds: float = 0.0
    machine: Machine | None = None
    words: tuple[str, ...] = ()
    not_made: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_microbatches(self) -> int:
        """How often a schedule runs for one update."""
        return sum(part.count for part in self.parts)

    @property
    def seconds(self) -> float:
        """Predicted duration of the whole step."""
        return sum(p.plan.seconds * p.count for p in self.parts) + self.finish_seconds

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step."""
        return self.memory.peak_bytes(max(part.plan.peak_bytes for part in self.parts))

    @property
    def is_bit_exact(self) -> bool:
        """Whether sums are rounded in the plain step's order."""
        return all(move.effect is not Effect.REORDERS_SUMS for move in self.moves)

    @property
    def handicapped_seconds(self) -> float:
        """Its duration, longer by as much as it is worth to do without what it changes."""
        margin = 1.0 if self.is_bit_exact else ROUNDING_MARGIN
        return self.seconds * margin * math.prod(move.penalty for move in self.moves)

    @property
    def slowdown(self) -> float:
        """Predicted duration over that of the same calls without recomputation or transfers."""
        return max(part.plan.slowdown for part in self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done that costs time."""
        return self.slowdown <= 1.0 + 1e-9 and all(move.is_free for move in self.moves)

    def made(self, kind: type[Move]) -> Move | None:
        """Return the move of a kind, if it is made."""
        return next((move for move in self.moves if isinstance(move, kind)), None)
