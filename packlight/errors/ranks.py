"""Ranks that fail or differ; pipelines and clusters that cannot run."""

from __future__ import annotations

from typing import Any

from packlight.errors.base import PacklightError, hinted


class PipelineError(PacklightError, ValueError):
    """A pipeline's schedule that cannot run: found before anything does.

    Attributes:
        rank: whose instruction it is.
        position: in that rank's instructions; None where one is missing.
    """

    def __init__(self, rank: int, position: int | None, message: str) -> None:
        self.rank = rank
        self.position = position
        where = f"rank {rank}" if position is None else f"rank {rank}, instruction {position}"
        super().__init__(f"{where}: {message}")


class ClusterPlanError(PacklightError, ValueError):
    """No layout of a model fits on a cluster.

    Attributes:
        least_bytes: what the first stage of the layout that comes closest takes on each GPU.
        budget_bytes: what there is.
    """

    def __init__(self, message: str, *, least_bytes: int, budget_bytes: int) -> None:
        self.least_bytes = least_bytes
        self.budget_bytes = budget_bytes
        super().__init__(message)


class RankError(PacklightError, RuntimeError):
    """Another rank failed, is gone, or does not do what this one does.

    Attributes:
        rank: which, where that is known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        self.rank = rank
        super().__init__(message)


class RankMismatchError(RankError):
    """Ranks that were asked for different things; nothing has run.

    Attributes:
        what: differs, such as "parameter 'head.weight'".
        rank: the first that differs from the other.
        expected, found: what the other has, and that rank.
        other: rank 0, or the first of those that have to have the same.
    """

    def __init__(
        self, what: str, rank: int, expected: Any, found: Any, hint: str = "", other: int = 0
    ) -> None:
        self.what, self.expected, self.found, self.other = what, expected, found, other
        super().__init__(
            f"rank {rank} differs from rank {other} in {what}: {found}, where rank {other} has "
            f"{expected}{hinted(hint)}", rank,
        )
