"""The picture of a pipeline: ranks against time, with its bubbles and messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packlight.cluster import PipelineTimeline, Work
from packlight.report.figures import WIDTH_INCHES, second_axis
from packlight.report.style import LIGHT, drawing
from packlight.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    Work.FORWARD: ("planned", "forward"),
    Work.BACKWARD: ("allocated", "backward"),
    Work.INPUT: ("allocated", "backward, of inputs"),
    Work.WEIGHT: ("bound", "backward, of weights"),
    Work.RECOMPUTE: ("optimizer", "recomputed"),
    Work.UPDATE: ("accumulated", "update"),
}
# More runs than that on a rank are no longer told apart: the first and last are drawn.
_MAX_RUNS = 160


def pipeline_picture(timeline: PipelineTimeline, title: str = "") -> Figure:
    """Return ranks against time; of long pipelines the beginning.

    Args:
        timeline: of `simulate_pipeline`.
        title: above it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    num_ranks = len(timeline.runs)
    longest = max(len(runs) for runs in timeline.runs)
    end = timeline.total_seconds
    if longest > _MAX_RUNS:
        end = max(runs[min(_MAX_RUNS, len(runs)) - 1].end_seconds for runs in timeline.runs)
    with drawing() as matplotlib:
        height = min(1.2 + 0.24 * num_ranks, 9.0)
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height))
        axes = figure.add_axes((0.075, 0.55 / height, 0.905, 1 - 1.05 / height))
        drawn: set[Work] = set()
        for rank, runs in enumerate(timeline.runs):
            for run in runs:
                work = run.instruction.work
                if run.start_seconds >= end:
                    break
                colour, label = _COLOURS[work]
                axes.barh(
                    rank, run.end_seconds - run.start_seconds, left=run.start_seconds, height=0.86,
                    color=LIGHT[colour], edgecolor=LIGHT["surface"], linewidth=0.4,
                    alpha=0.55 + 0.45 * (run.instruction.stage // num_ranks % 2 == 0),
                    label="" if work in drawn else label,
                )
                drawn.add(work)
        axes.set_ylim(num_ranks - 0.5, -0.5)
        axes.set_xlim(0, end)
        axes.grid(False)
        axes.set_ylabel("rank")
        second_axis(axes.xaxis, end)
        part = "" if end == timeline.total_seconds else (
            f", the first {format_seconds(end)} of {format_seconds(timeline.total_seconds)}"
        )
        axes.set_xlabel(f"seconds{part}" if end >= 1 else f"milliseconds{part}")
        axes.set_title(title, loc="left", fontsize=9.5)
        figure.legend(
            loc="upper right", ncols=4, bbox_to_anchor=(0.985, 1.0), borderaxespad=0.2,
            handlelength=1.2,
        )
    return figure
