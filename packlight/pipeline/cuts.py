"""Where a captured step is cut, so that the slowest stage is as fast as it can be."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.errors import OptionError
from packlight.planner.facts import Facts
from packlight.planner.segments import backward_labels, cut_points
from packlight.step import Phase, StepGraph

CANDIDATES_A_STAGE = 16
MOST_CANDIDATES = 256


def choose_cuts(graph: StepGraph, num_stages: int) -> list[int]:
    """Return the operations before which a step's forward is cut.

    Candidates are where few bytes cross, as for the planner of one device; among them the slowest
    stage, forward and backward, is made as fast as possible (exact, by dynamic programming over
    contiguous parts).

    Args:
        graph: of one microbatch, with measured seconds.
        num_stages: how many parts.

    Raises:
        OptionError: there are fewer places to cut.
    """
    if num_stages == 1:
        return []
    facts, places = Facts(graph), graph.num_forward - 1
    if places < num_stages - 1:
        raise OptionError(
            f"{num_stages} stages: the model can be cut in {places} places\n"
            f"hint: at most {places + 1} stages"
        )
    cuts = cut_points(facts, CANDIDATES_A_STAGE * num_stages)
    if len(cuts) < 2 * num_stages:  # long skip connections: nowhere do few bytes cross
        wanted = max(num_stages - 1, min(places, MOST_CANDIDATES))
        cuts = [1 + index * places // wanted for index in range(wanted)]
    parts = _seconds_between(graph, cuts, backward_labels(facts, cuts))
    return [cuts[end - 1] for end in balanced(parts, num_stages)[:-1]]


def balanced(seconds: Sequence[float], num_parts: int) -> list[int]:
    """Return the ends of contiguous parts whose largest sum is as small as possible.

    >>> balanced([1.0, 1.0, 1.0, 3.0], 2)
    [3, 4]
    """
    num = len(seconds)
    total = [0.0]
    for value in seconds:
        total.append(total[-1] + value)
    # best[k][end]: the largest sum of the first `end` in k parts, and where the last of them begins
    best = [[(value, 0) for value in total]]
    for _ in range(1, num_parts):
        before = best[-1]
        best.append([
            min(
                ((max(before[start][0], total[end] - total[start]), start)
                 for start in range(1, end)),
                default=(float("inf"), 0),
            )
            for end in range(num + 1)
        ])
    ends, end = [], num
    for row in reversed(best):
        ends.append(end)
        end = row[end][1]
    return ends[::-1]


def _seconds_between(
    graph: StepGraph, cuts: Sequence[int], labels: Sequence[int]
) -> list[float]:
    """Return the seconds of each part, forward and backward."""
    seconds = [0.0] * (len(cuts) + 1)
    num_forward = graph.num_forward
    place = 0
    for index, operation in enumerate(graph.computations):
        if index < num_forward:
            while place < len(cuts) and index >= cuts[place]:
                place += 1
            seconds[place] += operation.seconds
        elif operation.phase is Phase.BACKWARD:
            seconds[labels[index - num_forward]] += operation.seconds
    return seconds
