"""What is seen of a step in pieces: who holds what at each border, and what Python allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from packlight.capture.pieces import Piece
from packlight.costs.levels import Level, LevelRecorder
from packlight.lower.frame import Frame
from packlight.lower.program import Program
from packlight.planner.path import Gap, Order, Path, PieceRun, Section
from packlight.step import Schedule, live_after_forward
from packlight.torch_internals.storages import StorageWatch, storage_identity


@dataclass(frozen=True)
class ReadyPiece:
    """A piece with an order that it runs in.

    Attributes:
        order: of its operations.
        schedule: the same as a schedule.
        program: that runs it.
    """

    order: Order
    schedule: Schedule
    program: Program


@dataclass
class Run:
    """One run of a piece, from its forward to the end of its backward.

    Attributes:
        piece: which.
        ready: how it runs.
        index: among the step's runs.
        step_number: of the step that it belongs to.
        frame: what the backward needs; None where it is over.
        held: inputs that Python has made, which stay whatever the plan is.
        versions: of inputs that the backward reads: they must not change in between.
        shared: buffer -> number of its storage, while a step is recorded.
        made: watches of what its forward has returned, where a budget may depend on it.
    """

    piece: Piece
    ready: ReadyPiece
    index: int
    step_number: int
    frame: Frame | None = None
    held: list[torch.Tensor] = field(default_factory=list)
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    shared: dict[int, int] = field(default_factory=dict)
    made: list[StorageWatch] = field(default_factory=list)

    def kept(self) -> list[torch.Tensor]:
        """Return what it keeps for its backward, what was there before the step aside."""
        if self.frame is None:
            return []
        buffers = self.piece.step.graph.buffers
        return [
            value for buffer, value in self.frame.values.items()
            if isinstance(value, torch.Tensor) and not buffers[buffer].kind.is_resident
        ]

    @property
    def kept_bytes(self) -> int:
        """What it keeps for its backward besides storages that others may hold."""
        if self.frame is None:
            return 0
        graph = self.piece.step.graph
        kept = live_after_forward(graph, self.ready.schedule) - self.shared.keys()
        return sum(graph.buffers[b].bytes for b in kept)


@dataclass(frozen=True, slots=True)
class Border:
    """What there is when a section begins, or the step ends.

    Attributes:
        holds: the storages that others than pieces hold, of those that pieces have made.
        there_bytes: of all of those.
        kept: what each run so far keeps besides, in bytes.
    """

    holds: frozenset[int]
    there_bytes: int
    kept: tuple[int, ...]

    @property
    def kept_bytes(self) -> int:
        """What all runs keep besides."""
        return sum(self.kept)


class StepRecord:
    """What is seen of one step.

    Two profilers at once cannot be, so nothing is seen of Python while somebody else watches, nor
    while pieces are captured, which observes calls one by one.

    Args:
        device: whose allocator to watch.

    Attributes:
        has_levels: whether Python is watched.
        is_over: whether the last section has ended.
        borders: before each section so far, and at the end.
        runs: in order.
    """

    def __init__(self, device: torch.device) -> None:
        self._watches: list[StorageWatch] = []
        self._numbers: dict[int, int] = {}
        self.borders: list[Border] = []
        self.runs: list[Run] = []
        self.is_over = False
        self._taken_back: list[int] = []
        self._recorder = LevelRecorder(device) if LevelRecorder.is_possible(device) else None
        self._mark()

    @property
    def has_levels(self) -> bool:
        """Whether Python is watched."""
        return self._recorder is not None

    def _mark(self) -> None:
        if self._recorder is not None:
            self._recorder.mark()

    def section_begins(self) -> Border:
        """Note what there is after some Python."""
        border = self.look_around()
        self._mark()
        return border

    def section_ends(self) -> None:
        """Note that Python goes on."""
        self._mark()

    def end(self) -> None:
        """Note that the last section has ended."""
        if not self.is_over:
            self.section_begins()
            self.is_over = True

    def go_on(self) -> None:
        """Take back that the last section has ended: another backward comes."""
        if self.is_over:
            self.is_over = False
            self.borders.pop()
            self._taken_back.append(2 * len(self.borders) + 1)

    def stop(self) -> list[Level] | None:
        """Watch no more; return what was seen, if anything was."""
        recorder, self._recorder = self._recorder, None
        levels = None if recorder is None else recorder.stop()
        # Somebody else's profiler may have ended this one.
        num_marks = 2 * len(self.borders) + len(self._taken_back)
        if levels is None or len(levels) != num_marks:
            return None
        for place in self._taken_back:
            now, later = levels[place : place + 2]
            peak_bytes = max(now.peak_bytes, later.peak_bytes)
            levels[place : place + 2] = [replace(later, peak_bytes=peak_bytes)]
        return levels

    def look_around(self) -> Border:
        """Note what there is now."""
        mine = [0] * len(self._watches)
        for run in self.runs:
            for buffer in run.frame.values if run.frame is not None else ():
                if buffer in run.shared:
                    mine[run.shared[buffer]] += 1
        counts = [watch.num_tensors for watch in self._watches]
        border = Border(
            frozenset(n for n, count in enumerate(counts) if count > mine[n]),
            sum(w.num_bytes for w, n in zip(self._watches, counts, strict=True) if n),
            tuple(run.kept_bytes for run in self.runs),
        )
        self.borders.append(border)
        return border

    def note_given(self, run: Run, nodes: Sequence[Any], values: Sequence[Any]) -> None:
        """Note which of a section's arguments are what pieces have made."""
        for node, value in zip(nodes, values, strict=False):
            buffer = run.piece.step.buffer_of_node.get(node)
            if isinstance(value, torch.Tensor) and buffer is not None:
                number = self._number_of(value)
                if number is not None:
                    run.shared[buffer] = number

    def note_made(self, run: Run, nodes: Sequence[Any], values: Sequence[Any]) -> None:
        """Note what a section returns."""
        step = run.piece.step
        # What came in and is handed on, Python has made.
        given = {step.buffer_of_node[tangent] for tangent in step.tangents}
        for node, value in zip(nodes, values, strict=False):
            if not isinstance(value, torch.Tensor) or node not in step.buffer_of_node:
                continue
            buffer = step.buffer_of_node[node]
            is_made = buffer not in given and not step.graph.buffers[buffer].kind.is_resident
            if is_made and buffer not in run.shared:
                number = self._number_of(value)
                if number is None:
                    number = len(self._watches)
                    self._watches.append(StorageWatch(value))
                    self._numbers[storage_identity(value)] = number
                run.shared[buffer] = number

    def _number_of(self, tensor: torch.Tensor) -> int | None:
        number = self._numbers.get(storage_identity(tensor))
        return number if number is not None and self._watches[number].num_tensors else None

    def path(
        self, sections: Sequence[Section], levels: Sequence[Level], end_bytes: int
    ) -> Path:
        """Return what was recorded, in the planner's terms.

        What runs keep whose backward never comes is no other than what Python holds.

        Args:
            sections: of the step.
            levels: at the start, where each section begins and ends, at the end.
            end_bytes: what is needed for a moment behind the last section.
        """
        come_back = {section.run for section in sections if not section.is_forward}
        gaps = []
        for n, border in enumerate(self.borders):
            before, now = levels[2 * n], levels[2 * n + 1]
            kept_bytes = sum(size for run, size in enumerate(border.kept) if run in come_back)
            held_bytes = now.at_bytes - border.there_bytes - kept_bytes
            peak_bytes = now.peak_bytes - before.at_bytes
            if n == len(sections):
                peak_bytes = max(peak_bytes, end_bytes)
            gaps.append(Gap(max(0, held_bytes), max(0, peak_bytes), border.holds))
        runs = tuple(PieceRun(run.piece.step.graph, dict(run.shared)) for run in self.runs)
        return Path(runs, tuple(sections), tuple(gaps))
