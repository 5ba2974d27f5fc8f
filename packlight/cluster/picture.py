"""A pipeline's timeline in characters: a line for each rank, a column for each stretch of time."""

from __future__ import annotations

from packlight.cluster.instructions import Work
from packlight.cluster.timeline import PipelineTimeline

_SIGNS = {
    Work.FORWARD: "F", Work.BACKWARD: "B", Work.INPUT: "I", Work.WEIGHT: "W", Work.RECOMPUTE: "R",
    Work.UPDATE: "U",
}
_MAX_RANKS = 16


def drawn(timeline: PipelineTimeline, width: int = 96) -> list[str]:
    """Return a line for each rank: what it does for most of each column's time, "." for nothing.

    Of many ranks every n-th is shown, of a long pipeline the beginning.

    >>> from packlight.cluster import StageCosts, simulate_pipeline
    >>> from packlight.cluster.schedules import one_f_one_b
    >>> for line in drawn(simulate_pipeline(one_f_one_b(2, 3), [StageCosts(1, 1, 1)] * 2), 12):
    ...     print(line)
    rank 0  FF..BBFBB.BB
    rank 1  .FBBFBBFBB..
    """
    num_ranks = len(timeline.runs)
    every = -(-num_ranks // _MAX_RANKS)
    shown = sorted({*range(0, num_ranks, every), num_ranks - 1})
    shortest = min(run.end_seconds - run.start_seconds for runs in timeline.runs for run in runs)
    column = min(timeline.total_seconds / width, max(shortest, timeline.total_seconds / 2000))
    lines = []
    for rank in shown:
        most = [0.0] * width
        signs = ["."] * width
        for run in timeline.runs[rank]:
            at = min(int(run.start_seconds / column + 1e-9), width - 1)
            if run.start_seconds >= width * column:
                break
            while at < width and at * column < run.end_seconds - 1e-9 * column:
                start, end = at * column, (at + 1) * column
                inside = min(run.end_seconds, end) - max(run.start_seconds, start)
                if inside > most[at]:
                    most[at], signs[at] = inside, _SIGNS[run.instruction.work]
                at += 1
        lines.append(f"rank {rank:<{len(str(num_ranks - 1))}}  {''.join(signs)}")
    return lines
