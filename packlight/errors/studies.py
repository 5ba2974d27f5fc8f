"""Studies without a trial that fits, members that make no ensemble."""

from __future__ import annotations

from typing import Any

from packlight.errors.base import PacklightError, hinted


class NoFeasibleTrialError(PacklightError, ValueError):
    """No trial of a study fits in its memory.

    Attributes:
        memory_bytes: of all the study's processes.
        num_trials: how many were looked at.
        smallest_bytes: the smallest memory with which one of them would fit, None if none is known.
        trial: its number.
    """

    def __init__(
        self, memory_bytes: int, num_trials: int, smallest_bytes: int | None, trial: int | None
    ) -> None:
        from packlight.units import format_bytes

        self.memory_bytes, self.num_trials = memory_bytes, num_trials
        self.smallest_bytes, self.trial = smallest_bytes, trial
        hint = "a space with smaller models or batches"
        if smallest_bytes is not None:
            hint = f"trial {trial} fits in {format_bytes(smallest_bytes)} ({smallest_bytes} bytes)"
        super().__init__(
            f"none of {num_trials} trials fits in {format_bytes(memory_bytes)}" + hinted(hint)
        )


class MemberError(PacklightError, ValueError):
    """Members that make no ensemble, or settings and batches that are not for its members.

    Attributes:
        name: of the tensor in which two members differ, "" if it is something else.
        shapes: of it in both: (shape, dtype), or None where a member has none.
    """

    def __init__(
        self, problem: str, name: str = "", shapes: tuple[Any, ...] = (), hint: str = ""
    ) -> None:
        self.name, self.shapes = name, shapes
        super().__init__(problem + hinted(hint))
