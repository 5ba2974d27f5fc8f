"""Budgets, options, schedules, moves and ways that do not do; what is missing for them."""

from __future__ import annotations

from typing import Any

from packlight.errors.base import PacklightError, hinted


class BudgetFormatError(PacklightError, ValueError):
    """A budget that is not a positive number of bytes."""

    def __init__(self, budget: Any, hint: str) -> None:
        self.budget = budget
        super().__init__(f"not a memory budget: {budget!r}" + hinted(hint))


class InfeasibleBudgetError(PacklightError, ValueError):
    """No schedule fits in the budget.

    Attributes:
        budget_bytes: what was asked for.
        smallest_bytes: the smallest budget for which a schedule was found.
        peak_operation: the operation at which that schedule peaks.
        peak_buffers: (name, bytes) of what is live there, largest first.
        hint: what would lower it.
    """

    def __init__(
        self,
        budget_bytes: int,
        smallest_bytes: int,
        peak_operation: str,
        peak_buffers: list[tuple[str, int]],
        hint: str = "",
    ) -> None:
        from packlight.units import format_bytes

        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.peak_operation = peak_operation
        self.peak_buffers = peak_buffers
        self.hint = hint
        live = " + ".join(f"{format_bytes(size)} {name}" for name, size in peak_buffers[:4])
        rest = [size for _, size in peak_buffers[4:]]
        more = f" + {format_bytes(sum(rest))} in {len(rest)} smaller" if rest else ""
        super().__init__(
            f"budget {format_bytes(budget_bytes)} is below the smallest feasible peak, "
            f"{format_bytes(smallest_bytes)} ({smallest_bytes} bytes)\n"
            f"  the peak is at {peak_operation}: {live}{more}" + hinted(hint)
        )


class ScheduleError(PacklightError, ValueError):
    """A schedule that cannot run: a buffer read, freed or returned while it is not in memory."""

    def __init__(self, instruction_index: int, message: str) -> None:
        self.instruction_index = instruction_index
        super().__init__(f"instruction {instruction_index}: {message}")


class OptionError(PacklightError, ValueError):
    """An unknown option, or an option with a value that it does not take."""


class MoveError(PacklightError, RuntimeError):
    """A move that an installed package brings does not work; nothing was planned with it.

    Attributes:
        move: its name.
        package: where it comes from.
        problem: what is in the way.
    """

    def __init__(self, move: str, package: str, problem: str) -> None:
        self.move, self.package, self.problem = move, package, problem
        super().__init__(
            f"the move {move!r} of {package!r}: {problem}\n"
            f"hint: moves= without {move!r} leaves it out; if it does not load at all, mend or "
            f"uninstall {package!r}"
        )


class WayError(PacklightError, ValueError):
    """A saved way to run a step that is not one for this step, here and now.

    Attributes:
        what: differs: "step", "torch", "device", "budget", "moves".
        saved, found: what the way says, and what is the case.
    """

    def __init__(self, what: str, saved: Any, found: Any, hint: str) -> None:
        self.what, self.saved, self.found = what, saved, found
        super().__init__(f"the saved way is for another {what}: {saved}, not {found}\nhint: {hint}")


class FormatError(PacklightError, ValueError):
    """A saved plan, graph or checkpoint that cannot be read."""


class OffloadError(PacklightError, RuntimeError):
    """A buffer could not be sent to the tier that it is offloaded to, or did not come back.

    Attributes:
        directory: where the tier keeps its file, None for a tier in memory.
        needed_bytes, free_bytes: what was to be reserved and what was free, where that matters.
    """

    def __init__(
        self,
        message: str,
        *,
        directory: str | None = None,
        needed_bytes: int | None = None,
        free_bytes: int | None = None,
        hint: str = "",
    ) -> None:
        self.directory, self.needed_bytes, self.free_bytes = directory, needed_bytes, free_bytes
        super().__init__(message + hinted(hint))


class MissingExtraError(PacklightError, ImportError):
    """A feature needs a package that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, feature: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{feature} needs the package {package!r}\nhint: pip install 'packlight[{extra}]'"
        )
