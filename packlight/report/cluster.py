"""The picture of a pipeline: ranks against time, with its bubbles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packlight.cluster import PipelineTimeline, Work
from packlight.report.figures import WIDTH_INCHES, second_axis
from packlight.report.style import LIGHT, drawing
from packlight.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def pipeline_picture(timelines: Mapping[str, PipelineTimeline]) -> Figure:
    """Return ranks against time, one pipeline below the other; of long ones the beginning.

    Args:
        timelines: of `simulate_pipeline`, by what stands above each.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    end = max(shown_seconds(timeline) for timeline in timelines.values())
    whole = max(timeline.total_seconds for timeline in timelines.values())
    heights = [min(0.24 * len(timeline.runs), 8.0) for timeline in timelines.values()]
    height = 0.85 + sum(heights) + 0.36 * (len(heights) - 1)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height))
        top = height - 0.4
        labels: dict[str, Any] = {}
        for (title, timeline), own in zip(timelines.items(), heights, strict=True):
            axes = figure.add_axes((0.075, (top - own) / height, 0.905, own / height))
            labels |= _draw(axes, timeline, end)
            axes.set_title(title, loc="left", fontsize=9.5, pad=3)
            axes.set_xticks([])
            top -= own + 0.36
        second_axis(axes.xaxis, end)
        part = "" if end == whole else (
            f", the first {format_seconds(end)} of {format_seconds(whole)}"
        )
        axes.set_xlabel(f"seconds{part}" if end >= 1 else f"milliseconds{part}")
        figure.legend(
            labels.values(), labels.keys(), loc="upper right", ncols=5,
            bbox_to_anchor=(0.985, 1.0), borderaxespad=0.2, handlelength=1.2,
        )
    return figure


def shown_seconds(timeline: PipelineTimeline) -> float:
    """Return until when a timeline is drawn."""
    if max(len(runs) for runs in timeline.runs) <= _MAX_RUNS:
        return timeline.total_seconds
    return max(runs[min(_MAX_RUNS, len(runs)) - 1].end_seconds for runs in timeline.runs)


def _draw(axes: Axes, timeline: PipelineTimeline, end: float) -> dict[str, Any]:
    """Draw one pipeline; return what stands for each kind of work."""
    num_ranks = len(timeline.runs)
    drawn: dict[str, Any] = {}
    for rank, runs in enumerate(timeline.runs):
        for run in runs:
            if run.start_seconds >= end:
                break
            colour, label = _COLOURS[run.instruction.work]
            bars = axes.barh(
                rank, run.end_seconds - run.start_seconds, left=run.start_seconds, height=0.86,
                color=LIGHT[colour], edgecolor=LIGHT["surface"], linewidth=0.4,
                alpha=0.55 + 0.45 * (run.instruction.stage // num_ranks % 2 == 0),
            )
            drawn.setdefault(label, bars)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.grid(False)
    axes.set_ylabel("rank")
    return drawn
