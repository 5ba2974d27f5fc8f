"""Runs the pieces of a step that breaks, each as planned, and sees what Python does between them.

A step's *path* is the sections that run in it, in order: forwards and backwards of pieces. As long
as a step takes a path that is planned, each piece runs as planned for its place on it. On a new
path each piece runs under a small plan of its own, one that keeps little; what Python between them
holds and allocates is recorded, and then all pieces of the path are planned together
(planner/pieces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import nn

from packlight.capture.pieces import Piece
from packlight.costs.profiler import CallProfiler
from packlight.errors import UnsupportedModelError
from packlight.lower.frame import Frame
from packlight.planner.path import Gap, Path, PathPlan, PieceRun, Section, order_of
from packlight.planner.pieces import Stitched, plan_path
from packlight.run.in_flight import RunsInFlight
from packlight.run.piece_record import ReadyPiece, Run, StepRecord
from packlight.run.piece_room import Room, ready_piece
from packlight.search.piece_times import PieceTimes
from packlight.step import simulate
from packlight.torch_internals.autograd import is_graph_retained
from packlight.torch_internals.storages import StorageWatch, version

# After so many planned paths, one is planned only if it was taken before.
MANY_PATHS = 6

# Bytes of gradients that were there already; the sections, each with its piece's digest.
Taken = tuple[int, tuple[tuple[Section, str], ...]]


@dataclass(frozen=True)
class PlannedPath:
    """A path and how its pieces run.

    Attributes:
        path: as it was recorded.
        plan: of all of it.
        pieces: which piece each run is of.
    """

    path: Path
    plan: PathPlan
    pieces: tuple[Piece, ...]


def note_left_out(left_out: dict[str, str], code: CodeType, reason: str) -> None:
    """Take note of a function that dynamo left to eager PyTorch, and why, in a line."""
    place = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
    left_out.setdefault(place, reason.strip().partition("\n")[0])


class Pieces:
    """The pieces of one user's function; a `Host` (capture/pieces.py).

    Args:
        device: where they run.
        budget_bytes: for what a step allocates, everything between pieces included, asked for when
            it begins; None for no limit.
        end_bytes: what is needed for a moment behind the last section.
        gradients: that a step's backwards have left so far.

    Attributes:
        num_captured: how many pieces there were so far.
        latest: the path of the latest step, if it is planned.
        left_out: functions that dynamo left to eager PyTorch: "file:line name" -> why.
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: Callable[[], int | None],
        end_bytes: Callable[[], int] = lambda: 0,
        gradients: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        self.device, self._budget_bytes, self._end_bytes = device, budget_bytes, end_bytes
        self.num_captured = 0
        self.latest: PlannedPath | None = None
        self._latest_of_kind: dict[int, PlannedPath | None] = {}
        self.left_out: dict[str, str] = {}
        self._planned: dict[Taken, PlannedPath] = {}
        # Those of which it is not known yet what Python does between the sections.
        self._alone: dict[Taken, PlannedPath] = {}
        self._seen: dict[Taken, int] = {}
        self._in_flight = RunsInFlight(gradients)
        self._room = Room(self._in_flight, budget_bytes)
        self._step_number = self._num_runs = self._gradient_bytes = 0
        self._is_alone = True
        self._record: StepRecord | None = None
        self._times: PieceTimes | None = None
        self._taken: list[tuple[Section, str]] = []
        self._expected: PlannedPath | None = None

    # -- what capture tells

    def observing(self) -> None:
        """Record no levels in this step: a call is about to be observed alone."""
        if self._record is not None:
            self._record.stop()

    def captured(self, piece: Piece) -> None:
        """Take note of a new piece; one that has a plan of its own is planned for as a step."""
        self.num_captured += 1
        if piece.plan is None:
            return
        graph, schedule = piece.step.graph, piece.plan.schedule
        order = order_of(graph, schedule)
        ready_piece(piece, order, schedule)
        # Inputs are the user's to hold or to let go of.
        inputs = {b: n for n, b in enumerate(b.id for b in graph.buffers if b.kind.is_resident)}
        sections = Section(0, True), Section(0, False)
        nothing = Gap(0, 0, frozenset())
        path = Path((PieceRun(graph, inputs),), sections, (nothing, nothing, nothing))
        planned = PlannedPath(path, PathPlan((order,), piece.plan), (piece,))
        self._alone[0, tuple((section, piece.digest) for section in sections)] = planned

    def left_to_eager(self, code: CodeType, reason: str) -> None:
        """Take note of a function that runs uncompiled."""
        note_left_out(self.left_out, code, reason)

    # -- steps

    @property
    def is_recording(self) -> bool:
        """Whether a profiler watches the step."""
        return self._record is not None and self._record.has_levels

    @property
    def is_in_step(self) -> bool:
        """Whether a backward of the step may still come."""
        return any(run.step_number == self._step_number for run in self._in_flight.alive())

    def begin_step(self, gradient_bytes: int = 0, is_captured: bool = False) -> None:
        """Expect a step; record it unless the path of the one before is planned.

        Args:
            gradient_bytes: of gradients that are there already: each number of them makes a step of
                another kind.
            is_captured: no piece has to be captured first.
        """
        self._step_number += 1
        self._gradient_bytes = gradient_bytes
        self._taken, self._num_runs = [], 0
        self._is_alone = not self._in_flight.alive()
        self._in_flight.begin_step()
        self._expected = self._latest_of_kind.get(gradient_bytes) if self._is_alone else None
        self._record = self._times = None
        if self._expected is None:
            self._record = StepRecord(self.device)
            if self._step_number == 1 and not is_captured:
                self._record.stop()  # pieces are about to be captured

    def end_sections(self) -> None:
        """Note that the step's last backward has ended."""
        if self._record is not None:
            self._record.end()

    def end_step(self) -> None:
        """Plan the path that was taken, if that is new; not within a backward.

        Raises:
            InfeasibleBudgetError: it does not fit.
        """
        record, self._record = self._record, None
        taken = (self._gradient_bytes, tuple(self._taken))
        self._note_latest(self._planned.get(taken))
        if record is None:
            return
        record.end()
        levels = record.stop()
        self._seen[taken] = self._seen.get(taken, 0) + 1
        is_worth_it = len(self._planned) < MANY_PATHS or self._seen[taken] > 1
        # Of a retained graph a backward comes twice.
        is_simple = self._is_alone and len(set(self._taken)) == len(self._taken)
        if self.latest is not None or not is_simple:
            return
        alone = self._alone.get(taken)
        if levels is not None and (is_worth_it or alone is not None):
            self._keep_times(record)
            path = record.path([section for section, _ in self._taken], levels, self._end_bytes())
            planned = self._planned_path(path, record, alone)
        elif alone is not None:  # somebody else watches
            planned = alone
        else:
            return
        self._planned[taken] = planned
        self._note_latest(planned)

    def _planned_path(
        self, path: Path, record: StepRecord, alone: PlannedPath | None
    ) -> PlannedPath:
        """Plan a path, unless a plan made for its only piece holds with what Python does, too."""
        pieces, budget_bytes = tuple(run.piece for run in record.runs), self._budget_bytes()
        if alone is not None:
            stitched = Stitched(path)
            peak_bytes = simulate(stitched.graph, stitched.schedule(alone.plan.orders)).peak_bytes
            if budget_bytes is None or peak_bytes <= budget_bytes:
                return replace(alone, path=replace(path, runs=alone.path.runs))
        plan = plan_path(path, budget_bytes, [run.ready.order for run in record.runs])
        return PlannedPath(path, plan, pieces)

    def _note_latest(self, planned: PlannedPath | None) -> None:
        self.latest = self._latest_of_kind[self._gradient_bytes] = planned

    def leave_step(self) -> None:
        """Forget a step that has no backward."""
        record, self._record = self._record, None
        if record is not None:
            record.stop()

    def give_up_step(self) -> None:
        """Forget a step that failed."""
        record, self._record = self._record, None
        self._note_latest(None)
        if record is not None:
            record.stop()
        self._in_flight.clear()

    def _call(self, piece: Piece) -> dict[str, Any]:
        """Return how a piece's code is called: with a clock where times are not known yet."""
        if self._record is None or not self._record.has_levels:
            return {}
        if all(f is None or f.in_step_seconds is not None for f in piece.step.facts):
            return {}
        if self._times is None:
            self._times = PieceTimes(self.device, CallProfiler(progress=False))
        return {"call": self._times.caller(piece.step)}

    def _keep_times(self, record: StepRecord) -> None:
        """Give the pieces the times that were seen in a recorded step."""
        times, self._times = self._times, None
        if times is not None:
            with times.profiler:
                for piece in {run.piece for run in record.runs}:
                    piece.step = times.timed(piece.step)

    # -- sections

    def forward(self, piece: Piece, primals: list[Any]) -> tuple[list[Any], torch.Tensor | None]:
        """Run a piece's forward as planned for its place."""
        record, step = self._record, piece.step
        index, self._num_runs = self._num_runs, self._num_runs + 1
        run = Run(piece, self._enter(piece, index, True), index, self._step_number)
        if record is not None:
            record.section_begins()
            record.runs.append(run)
            record.note_given(run, step.primals, primals)
        if self._expected is None:
            self._room.make(run)
        frame = Frame(run.ready.program, {}, **self._call(piece))
        results = list(frame.run([*primals]))
        if record is not None:
            record.note_made(run, step.forward_results, results)
        run.made = self._note_made(piece, step.forward_results, results)
        token = None
        if piece.has_backward:
            self._hold(run, frame, primals)
            token = self._in_flight.token(run)
        if record is not None:
            record.section_ends()
        return results, token

    def backward(self, piece: Piece, token: torch.Tensor, tangents: list[Any]) -> list[Any]:
        """Run the backward of a run."""
        run, step = self._in_flight.of(token), piece.step
        if run is None or run.frame is None:
            raise UnsupportedModelError(
                "what the forward has kept is gone before the backward: hooks that copy what "
                "autograd saves (save_on_cpu) cannot be used within a budget"
            )
        if any(version(tensor) != seen for tensor, seen in run.versions):
            raise RuntimeError(
                "a tensor needed for the backward was changed in place since the forward"
            )
        record = self._record if run.step_number == self._step_number else None
        if record is not None:
            record.go_on()
        if run.step_number == self._step_number:
            self._enter(piece, run.index, False)
        if record is not None:
            record.section_begins()
            record.note_given(run, step.tangents, tangents)
        if self._expected is None:
            self._room.make_for_backward(run, tangents)
        frame = run.frame
        if is_graph_retained():
            frame = frame.copy()
        else:
            run.frame = None
            run.versions.clear()
        gradients = list(frame.run(tangents))
        if record is not None:
            record.note_made(run, step.backward_results, gradients)
            record.section_ends()
        if self._expected is None:
            self._note_made(piece, step.backward_results, gradients)
        return gradients

    def _enter(self, piece: Piece, index: int, is_forward: bool) -> ReadyPiece:
        """Note the next section; return how it runs."""
        section, place = Section(index, is_forward), len(self._taken)
        self._taken.append((section, piece.digest))
        expected = self._expected
        if expected is not None:
            sections = expected.path.sections
            is_there = place < len(sections) and sections[place] == section
            if not is_there or expected.pieces[index].digest != piece.digest:
                self._expected = expected = self._other_path()
        if expected is not None:
            return ready_piece(piece, expected.plan.orders[index])
        return self._room.small(piece)

    def _other_path(self) -> PlannedPath | None:
        """Return a planned path that begins like this step."""
        taken = tuple(self._taken)
        for (gradient_bytes, sections), planned in self._planned.items():
            if gradient_bytes == self._gradient_bytes and sections[: len(taken)] == taken:
                return planned
        return None

    def _note_made(
        self, piece: Piece, nodes: Sequence[Any], values: Sequence[Any]
    ) -> list[StorageWatch]:
        """Watch what a section has made, where a budget may depend on it."""
        if self._budget_bytes() is None:
            return []
        graph, buffer_of = piece.step.graph, piece.step.buffer_of_node
        return self._in_flight.note_made(
            value for node, value in zip(nodes, values, strict=False)
            if node in buffer_of and not graph.buffers[buffer_of[node]].kind.is_resident
        )

    # -- what the backward needs

    def _hold(self, run: Run, frame: Frame, primals: Sequence[Any]) -> None:
        """Keep what the backward needs, results as tensors of their own.

        A result knows its gradient's function, and that the token: kept as it is, it would keep
        itself alive.
        """
        step = run.piece.step
        nodes = (r for r in step.forward_results if isinstance(r, torch.fx.Node))
        results = {step.buffer_of_node.get(node) for node in nodes}
        for buffer, value in frame.values.items():
            if buffer in results or buffer in run.shared:
                frame.values[buffer] = value.detach()
        shared = run.shared
        if self._record is None and self._expected is not None:
            shared = dict(self._expected.path.runs[run.index].shared)
        for node, primal in zip(step.primals, primals, strict=False):
            if not isinstance(primal, torch.Tensor):
                continue
            place = step.buffer_of_node.get(node)
            if place in frame.values:
                run.versions.append((frame.values[place], version(primal)))
            if place not in shared and not isinstance(primal, nn.Parameter):
                run.held.append(primal.detach())
        run.frame = frame
