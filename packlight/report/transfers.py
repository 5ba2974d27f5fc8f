"""What a plan transfers, as numbers and as a picture: computation and the lanes beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packlight.report.style import LIGHT, drawing
from packlight.step import (
    Action,
    Machine,
    OperationKind,
    Schedule,
    StepGraph,
    Timeline,
    simulate,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Gaps narrower than this share of a step are not drawn, and nothing is drawn narrower.
_NARROW = 1 / 3000
_COLOURS = {"compute": "planned", "write": "allocated", "read": "bound"}


@dataclass
class BufferTransfers:
    """What happens to one buffer on the lanes in one step.

    Attributes:
        buffer: its id.
        num_writes, num_reads: how often it goes and comes.
        lane_seconds: what that takes.
        gone_seconds: how long it is not in the device's memory between a write and a read, all its
            absences together; what rests elsewhere is gone from the start, and until the end.
    """

    buffer: int
    num_writes: int = 0
    num_reads: int = 0
    lane_seconds: float = 0.0
    gone_seconds: float = 0.0


def buffer_transfers(
    graph: StepGraph, schedule: Schedule, timeline: Timeline
) -> list[BufferTransfers]:
    """Return every buffer that is transferred, those with the most bytes on the lanes first."""
    found: dict[int, BufferTransfers] = {}
    for lane in timeline.lanes:
        for run in lane.runs:
            operation = graph.operations[run.operation]
            is_write = operation.kind is OperationKind.WRITE
            entry = found.setdefault(operation.moved, BufferTransfers(operation.moved))
            entry.num_writes += is_write
            entry.num_reads += not is_write
            entry.lane_seconds += run.end_seconds - run.start_seconds
    gone_since = dict.fromkeys(graph.resting, 0.0)
    for instruction, done in zip(schedule.instructions, timeline.done_seconds, strict=True):
        if instruction.overwrite is not None:  # its storage goes to what is created
            gone_since[instruction.overwrite[1]] = done
        if instruction.action is Action.FREE:
            gone_since[instruction.target] = done
            continue
        operation = graph.operations[instruction.target]
        if operation.kind is OperationKind.READ:
            away_since = gone_since.pop(operation.moved, done)
            found[operation.moved].gone_seconds += done - away_since
    for b in graph.resting:
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
    """Return when computations run and when lanes write, read and reduce: (start, end) in seconds.

    Where there are several lanes, they are told apart by their number.
    """
    rows = {"compute": [
        (done - graph.operations[i.target].seconds, done)
        for i, done in zip(schedule.instructions, timeline.done_seconds, strict=True)
        if i.action is Action.RUN and not graph.operations[i.target].lane
    ]}
    for number, lane in enumerate(timeline.lanes, 1):
        kinds = {graph.operations[run.operation].kind for run in lane.runs}
        is_network = OperationKind.REDUCE in kinds
        for kind in (
            (OperationKind.REDUCE,) if is_network else (OperationKind.WRITE, OperationKind.READ)
        ):
            name = kind.value if len(timeline.lanes) == 1 else f"{kind.value} {number}"
            rows[name] = [
                (run.start_seconds, run.end_seconds) for run in lane.runs
                if graph.operations[run.operation].kind is kind
            ]
    return rows


def lanes_over_time(graph: StepGraph, schedule: Schedule, machine: Machine) -> Figure:
    """Return the picture of what a step's lanes do, on the time axis of `memory_over_time`.

    Where the first row is empty, operations wait for another lane, or their cores copy for it.
    """
    from packlight.report.figures import WIDTH_INCHES, into_the_step, second_axis

    timeline = simulate(graph, schedule, machine)
    rows = busy(graph, schedule, timeline)
    end = max(timeline.seconds, 1e-9)
    height = 0.8 + 0.3 * len(rows)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height))
        axes = figure.add_axes((0.075, 0.51 / height, 0.905, 1 - 0.578 / height))
        for row, (name, intervals) in enumerate(rows.items()):
            colour = _COLOURS[name.split()[0]]
            joined = merged(sorted(intervals), end * _NARROW)
            drawn = [(a, max(b - a, end * _NARROW)) for a, b in joined]
            axes.broken_barh(drawn, (row - 0.36, 0.72), color=LIGHT[colour], linewidth=0)
        axes.set_yticks(range(len(rows)), list(rows), color=LIGHT["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, end)
        axes.grid(False)
        second_axis(axes.xaxis, end)
        axes.set_xlabel(into_the_step(end))
    return figure
