"""Small steps: the exact search, with few nodes first, more where local moves did not do.

Where its queue runs empty, what was found is proven to be the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packlight.planner.exact import ExactSearch
from packlight.planner.facts import Facts
from packlight.planner.search import Found, schedule_of
from packlight.step import Limit, Schedule, StepGraph, simulate

MAX_EXACT = 64
FEW_NODES, MANY_NODES = 20_000, 200_000
CLOSE = 1.002


def is_small(graph: StepGraph) -> bool:
    """Whether a step is searched exactly."""
    return len(graph.computations) <= MAX_EXACT


@dataclass
class Attempt:
    """What is known about one budget.

    Attributes:
        budget_bytes: which.
        bound_seconds: no schedule within it is faster.
        found: schedules.
        is_proven: whether nothing was left to look at: none is faster than the fastest found, or
            there is none at all.
        limit: what ended the search if nothing was proven.
    """

    budget_bytes: int
    bound_seconds: float
    found: list[Found]
    is_proven: bool = False
    limit: Limit = Limit.MOVES

    @property
    def best(self) -> Found | None:
        """The fastest that fits."""
        fitting = [f for f in self.found if f.peak_bytes <= self.budget_bytes]
        return min(fitting, key=lambda f: (f.seconds, f.peak_bytes), default=None)


class Small:
    """Searches one small step, for any number of budgets."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        self._exact = ExactSearch(graph)
        self._floor_bytes = Facts(graph).least_peak_bytes

    def attempt(
        self, attempt: Attempt, local_search: Callable[[int], list[Found]]
    ) -> None:
        """Look for the fastest schedule within a budget.

        Args:
            attempt: takes what is found out.
            local_search: goes on from good seeds where few nodes do not do.
        """
        if self._ask(self._exact, attempt, FEW_NODES, 0):
            return
        attempt.limit = Limit.NODES
        keeping = ExactSearch(self.graph, keep_outputs=True)
        self._ask(keeping, attempt, 3 * FEW_NODES, 0)
        attempt.found.extend(local_search(attempt.budget_bytes))
        searches = ((self._exact, 3 * FEW_NODES, 100), (keeping, MANY_NODES, 1000))
        for search, num_nodes, width in searches:
            best = attempt.best
            if best is not None and best.seconds <= CLOSE * attempt.bound_seconds:
                return
            self._ask(search, attempt, num_nodes, width)
        if attempt.best is None:
            order, attempt.is_proven = self._any_within(attempt.budget_bytes, MANY_NODES // 4)
            if order is not None:
                attempt.found.append(schedule_of(self.graph, order))

    def _ask(self, search: ExactSearch, attempt: Attempt, max_nodes: int, width: int) -> bool:
        """Run one exact search, note what it finds, return whether that settles the budget."""
        known, plain_seconds = attempt.best, self.graph.seconds
        upper = math.inf if known is None else known.seconds - plain_seconds
        answer = search.fastest(attempt.budget_bytes, max_nodes, min(upper, 1e300), width)
        if answer.order is not None:
            attempt.found.append(schedule_of(self.graph, answer.order))
        if answer.is_proven:
            attempt.is_proven = True
        elif answer.bound_seconds > 0 and math.isfinite(answer.bound_seconds):
            bound_seconds = plain_seconds + answer.bound_seconds
            attempt.bound_seconds = max(attempt.bound_seconds, bound_seconds)
        return answer.is_proven

    def _any_within(self, budget_bytes: int, max_nodes: int) -> tuple[list[int] | None, bool]:
        """Return any schedule's order within a budget, and whether there can be none."""
        for prefer_short in (True, False):
            answer = self._exact.any_within(budget_bytes, max_nodes, prefer_short)
            if answer.is_proven or answer.order is not None:
                return answer.order, answer.is_proven
        return None, False

    def lower(self, found: Iterable[Schedule]) -> list[Schedule]:
        """Return schedules below those that were found, by smaller and smaller steps."""
        best = min(simulate(self.graph, schedule).peak_bytes for schedule in found)
        below: list[Schedule] = []
        floor_bytes = self._floor_bytes
        for part, finer, max_nodes in ((2, 2, FEW_NODES // 4), (96, 8, 2 * FEW_NODES)):
            while part < 2048 and best // part > 0:
                budget_bytes = best - best // part
                order, is_impossible = None, True
                if budget_bytes >= floor_bytes:
                    order, is_impossible = self._any_within(budget_bytes, max_nodes)
                if is_impossible:
                    floor_bytes = max(floor_bytes, budget_bytes + 1)
                if order is None:
                    part *= finer
                else:
                    below.append(schedule_of(self.graph, order).schedule)
                    best = simulate(self.graph, below[-1]).peak_bytes
        return below
