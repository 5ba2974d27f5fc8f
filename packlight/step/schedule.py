"""What is done with a step: a schedule, the timeline that it leads to, a plan somebody chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from packlight.units import format_bytes, format_seconds


class Action(StrEnum):
    """What an instruction does."""

    RUN = "run"
    FREE = "free"


class Reason(StrEnum):
    """Why a search for a schedule ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"


class Limit(StrEnum):
    """What ended a search that proved no optimum."""

    NODES = "nodes"
    MOVES = "local moves"
    OTHER_SIZES = "a search at other sizes"


@dataclass(frozen=True, slots=True)
class Termination:
    """How a search ended, and how good its result is known to be (as in OR-Tools' MathOpt).

    Attributes:
        reason: OPTIMAL where the result meets the bound.
        bound_seconds: no schedule within the budget is faster than this. Where a step is small
            enough to be searched exactly, the schedules meant are those in which the operations run
            for the first time in the graph's order; elsewhere all.
        limit: what ended the search; None where the optimum was found.
    """

    reason: Reason
    bound_seconds: float
    limit: Limit | None = None

    @classmethod
    def at(cls, seconds: float, bound_seconds: float, limit: Limit) -> Termination:
        """Return how a search ended.

        Args:
            seconds: of the schedule that it found.
            bound_seconds: proven for all schedules; one that is not below `seconds` is met.
            limit: what ended the search unless it found the optimum.
        """
        bound_seconds = min(bound_seconds, seconds)
        if seconds <= bound_seconds * (1 + 1e-9):
            return cls(Reason.OPTIMAL, bound_seconds)
        return cls(Reason.FEASIBLE, bound_seconds, limit)

    def __str__(self) -> str:
        """Return a word, and what ended the search."""
        return self.reason if self.limit is None else f"{self.reason}, limited by {self.limit}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a schedule.

    Computations and FREEs happen one after the other. An operation on another lane is handed to
    that lane, which works through its operations in their order beside computation: see `simulate`.

    Attributes:
        action: what to do.
        target: an operation's id for RUN, a buffer's id for FREE.
        overwrite: for RUN, one of the operation's `overwrites` pairs: created buffer first.
    """

    action: Action
    target: int
    overwrite: tuple[int, int] | None = None


@dataclass(frozen=True)
class Schedule:
    """The instructions of one whole step.

    Attributes:
        instructions: in order.
        num_forward: the first `num_forward` instructions run in the forward.
    """

    instructions: tuple[Instruction, ...]
    num_forward: int

    def runs(self) -> Iterator[int]:
        """Yield the ids of the operations that run, in order."""
        return (i.target for i in self.instructions if i.action is Action.RUN)

    def run_counts(self) -> dict[int, int]:
        """Return how often each operation runs, transfers among them."""
        return Counter(self.runs())


@dataclass(frozen=True, slots=True)
class LaneRun:
    """One operation on a lane beside computation.

    Attributes:
        operation: its id.
        start_seconds, end_seconds: when, from the start of the step.
    """

    operation: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class LaneTimeline:
    """What one lane does beside computation.

    Attributes:
        name: the lane's.
        runs: in order.
        busy_seconds: how long it works.
    """

    name: str
    runs: tuple[LaneRun, ...]
    busy_seconds: float


@dataclass(frozen=True)
class Timeline:
    """What a schedule costs, instruction by instruction.

    Attributes:
        live_bytes: bytes allocated in the device's memory after each instruction, resident buffers
            not counted.
        peak_bytes: the most allocated there at once, workspace included.
        peak_index: the instruction during which that happens.
        seconds: from the start to the end of the last operation on any lane.
        peak_buffers: ids of the buffers in the device's memory at the peak, largest first.
        peak_workspace_bytes: the part of the peak that is workspace.
        wait_seconds: the part of `seconds` in which computation waits for other lanes.
        done_seconds: when computation is done with each instruction.
        lanes: what happens beside computation, in the order of the machine's lanes.
        far_peak_bytes: the most in each other memory at once, those that rest there included.
    """

    live_bytes: tuple[int, ...]
    peak_bytes: int
    peak_index: int
    seconds: float
    peak_buffers: tuple[int, ...]
    peak_workspace_bytes: int
    wait_seconds: float = 0.0
    done_seconds: tuple[float, ...] = ()
    lanes: tuple[LaneTimeline, ...] = ()
    far_peak_bytes: tuple[tuple[str, int], ...] = ()

    @property
    def lane_seconds(self) -> float:
        """How long the lanes beside computation work, all together."""
        return sum(lane.busy_seconds for lane in self.lanes)


@dataclass(frozen=True)
class Plan:
    """A schedule, what it is predicted to cost, and how good it is known to be.

    Attributes:
        schedule: what to run.
        budget_bytes: what it was made for; None for "no limit".
        peak_bytes: predicted peak, resident buffers not counted.
        seconds: predicted duration.
        plain_seconds: predicted duration of the plain step (no recomputation).
        plain_peak_bytes: predicted peak of the plain step.
        termination: why the search ended, and the bound it proved.
        allowed: names of the approximate techniques that were allowed.
        num_microbatches: how often the schedule runs for one update.
        num_reruns: how many runs of computations are not their first.
        lane_seconds: how long the lanes beside computation work, all together.
        wait_seconds: the part of `seconds` in which computation waits for them.
        offloaded_bytes: what is written to other memories in one step.
    """

    schedule: Schedule
    budget_bytes: int | None
    peak_bytes: int
    seconds: float
    plain_seconds: float
    plain_peak_bytes: int
    termination: Termination
    allowed: tuple[str, ...] = ()
    num_microbatches: int = 1
    num_reruns: int = 0
    lane_seconds: float = 0.0
    wait_seconds: float = 0.0
    offloaded_bytes: int = 0

    def __str__(self) -> str:
        """Return one line: what runs, and at what price."""
        limit = "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes)}"
        times = f"{self.num_microbatches} times " if self.num_microbatches > 1 else ""
        plain = format_bytes(self.plain_peak_bytes)
        return (
            f"{times}{len(self.schedule.run_counts())} operations, {self.num_reruns} of them "
            f"recomputed: {format_bytes(self.peak_bytes)}{limit} (plain {plain}), "
            f"{format_seconds(self.seconds)}, {self.slowdown:.3f} x plain; {self.termination}"
        )

    @property
    def bound_seconds(self) -> float:
        """No schedule within the budget is faster than this; see `Termination`."""
        return self.termination.bound_seconds

    @property
    def slowdown(self) -> float:
        """Predicted duration over the plain step's."""
        return self.seconds / self.plain_seconds if self.plain_seconds > 0 else 1.0
