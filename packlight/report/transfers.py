"""What a plan transfers, as numbers and as a picture: compute lane and link, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packlight.report.style import LIGHT, drawing
from packlight.step import Action, Device, Schedule, StepGraph, Timeline, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Gaps narrower than this share of a step are not drawn, and nothing is drawn narrower.
_NARROW = 1 / 3000


@dataclass
class BufferTransfers:
    """What happens to one buffer on the link in one step.

    Attributes:
        buffer: its id.
        num_writes, num_reads: how often it goes and comes.
        link_seconds: what that takes.
        gone_seconds: how long it is not in memory between a write and a fetch, all its absences
            together; a stored buffer is gone from the start, and until the end.
    """

    buffer: int
    num_writes: int = 0
    num_reads: int = 0
    link_seconds: float = 0.0
    gone_seconds: float = 0.0


def buffer_transfers(
    graph: StepGraph, schedule: Schedule, timeline: Timeline
) -> list[BufferTransfers]:
    """Return every buffer that is transferred, those with the most bytes on the link first."""
    found: dict[int, BufferTransfers] = {}
    for transfer in timeline.transfers:
        entry = found.setdefault(transfer.buffer, BufferTransfers(transfer.buffer))
        entry.num_writes += transfer.action is Action.OFFLOAD
        entry.num_reads += transfer.action is Action.FETCH
        entry.link_seconds += transfer.end_seconds - transfer.start_seconds
    gone_since = dict.fromkeys(graph.stored, 0.0)
    for index, instruction in enumerate(schedule.instructions):
        target, done = instruction.target, timeline.done_seconds[index]
        if instruction.overwrite is not None:  # its storage goes to what is created
            gone_since[instruction.overwrite[1]] = done
        if instruction.action is Action.FREE:
            gone_since[target] = done
        elif instruction.action is Action.FETCH:
            found[target].gone_seconds += done - gone_since.pop(target, done)
    for b in graph.stored:
        if b in found and b in gone_since:
            found[b].gone_seconds += timeline.seconds - gone_since[b]

    def moved_bytes(entry: BufferTransfers) -> int:
        return graph.buffers[entry.buffer].bytes * (entry.num_writes + entry.num_reads)

    return sorted(found.values(), key=lambda e: (-moved_bytes(e), e.buffer))


def merged(intervals: Iterable[tuple[float, float]], gap_seconds: float) -> list[list[float]]:
    """Return intervals (in order) with those joined that are closer than a gap.

    >>> merged([(0, 1), (1.1, 2), (5, 6)], 0.5)
    [[0, 2], [5, 6]]
    """
    joined: list[list[float]] = []
    for start, end in intervals:
        if joined and start - joined[-1][1] <= gap_seconds:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return joined


def busy(
    graph: StepGraph, schedule: Schedule, timeline: Timeline
) -> dict[str, list[tuple[float, float]]]:
    """Return when operations run and when the link writes and reads: (start, end) in seconds."""
    runs = [
        (timeline.done_seconds[index] - graph.operations[i.target].seconds,
         timeline.done_seconds[index])
        for index, i in enumerate(schedule.instructions)
        if i.action is Action.COMPUTE
    ]
    lanes = {"compute": runs}
    for name, action in (("write", Action.OFFLOAD), ("read", Action.FETCH)):
        lanes[name] = [
            (t.start_seconds, t.end_seconds) for t in timeline.transfers if t.action is action
        ]
    return lanes


def link_lane(graph: StepGraph, schedule: Schedule, device: Device) -> Figure:
    """Return the picture of a step's two lanes, on the time axis of `memory_over_time`.

    Where the first row is empty, operations wait for the link, or their cores copy for it.
    """
    from packlight.report.figures import WIDTH_INCHES, into_the_step, second_axis

    timeline = simulate(graph, schedule, device)
    lanes = busy(graph, schedule, timeline)
    end = max(timeline.seconds, 1e-9)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, 1.7))
        axes = figure.add_axes((0.075, 0.30, 0.905, 0.66))
        for row, (intervals, colour) in enumerate(
            zip(lanes.values(), ("planned", "allocated", "bound"), strict=True)
        ):
            joined = merged(sorted(intervals), end * _NARROW)
            drawn = [(a, max(b - a, end * _NARROW)) for a, b in joined]
            axes.broken_barh(drawn, (row - 0.36, 0.72), color=LIGHT[colour], linewidth=0)
        axes.set_yticks(range(len(lanes)), list(lanes), color=LIGHT["ink"])
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlim(0, end)
        axes.grid(False)
        second_axis(axes.xaxis, end)
        axes.set_xlabel(into_the_step(end))
    return figure
