"""The lines of this benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PLANS, MEMBERS = FOLDER / "plans.jsonl", FOLDER / "members.jsonl"


@dataclass
class PlanLine:
    """One trial's step, captured and planned.

    Attributes:
        how: "from nothing" (a new process, an empty cache), "forked" (from a warm process, an empty
            cache), or "in a study" (forked, and with what earlier plans have left).
        index: which plan of the study.
        point: the trial's values.
        cpu_seconds: of the process, torch's import included where it is new.
        seconds: by the clock, on a machine that others used as well.
        num_known: calls known before.
    """

    how: str
    index: int
    point: dict[str, Any]
    cpu_seconds: float
    seconds: float
    num_known: int
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class MemberLine:
    """One step of several members of a width.

    Attributes:
        how: "alone" (eager PyTorch, one after the other), "at once" (one planned step), "chunked"
            (one member at a time, planned).
        width: of the members' hidden layers.
        num_members: how many.
        round: lines of a round were measured in turn.
        cpu_seconds: median over steps, of all members.
    """

    how: str
    width: int
    num_members: int
    round: int
    cpu_seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)
