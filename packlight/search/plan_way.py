"""One way to run the step: drafted by its moves, completed, its times known, planned."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from packlight.capture.batch import fresh
from packlight.capture.collectives import refuse_unheard
from packlight.capture.read_joint import read_joint_graph
from packlight.capture.sizes import Changing
from packlight.capture.step_capture import LossFunction, StepCapture, naming_failures
from packlight.capture.whole_step import WholeStep
from packlight.costs.cache import device_name
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError, ScheduleError
from packlight.lower.emit import emit
from packlight.moves.chunk.move import CHUNK_SHARE
from packlight.moves.data_parallel import DataParallel, sharding_of
from packlight.moves.draft import Draft, Traced
from packlight.moves.microbatch.move import Microbatch
from packlight.moves.microbatch.split import measured, num_rows, split
from packlight.moves.move import Move, Stage
from packlight.moves.precision import blaming_precision, chosen_precision, naming_missing_kernels
from packlight.moves.registry import of_package
from packlight.moves.stream.move import streamable
from packlight.moves.stream.streamed import Streaming
from packlight.planner import least_peak_bytes, plan_whole_step
from packlight.ranks.collectives import COLLECTIVES, is_heard, silent
from packlight.search.finish import finish_seconds
from packlight.search.heard import timing_collectives
from packlight.search.judge import judged
from packlight.search.partners import Partners
from packlight.search.ready import Ready, ReadyPart
from packlight.search.rehearse import (
    fits,
    in_known_terms,
    rehearse,
    with_estimated_seconds,
)
from packlight.search.way import Environment, PartPlan, Way
from packlight.step import Plan, Schedule, StepMemory
from packlight.step.digest import order_digest, structure_digest

Moves = tuple[Move, ...]


class HopelessError(Exception):
    """A single operation of a way needs too much: no schedule has to be looked for."""


class WayPlanner:
    """Plans ways to run the step on one batch; every size of microbatch is traced once.

    Args:
        base: the draft of the whole batch, not traced yet.
        loss_moves: that shaped it so far.
        profiler: observes calls.
        captures: of batches of the same tensors, by rows of the microbatch; filled here.
        changing: the sizes of the batch's tensors that change from batch to batch.

    Attributes:
        partners: other ranks that look at the same steps, whose costs count, too; None where this
            process plans alone.
        is_rehearsing: whether steps may run to see how long calls take in them.
    """

    def __init__(
        self,
        base: Draft,
        loss_moves: Moves,
        profiler: CallProfiler,
        captures: dict[int | None, StepCapture],
        changing: Changing | None = None,
    ) -> None:
        self._captures, self._changing = captures, changing
        self.base, self.loss_moves, self.profiler = base, loss_moves, profiler
        self.request, self.costs, self.batch = base.request, base.costs, base.batch
        self.partners: Partners | None = None
        self._traced: dict[int | None, Traced] = {}
        self._drafts: dict[tuple[int | None, Moves], Draft] = {}
        self.is_rehearsing = not base.request.is_weightless

    def forget(self) -> None:
        """Let go of the example batch; what was traced can still run."""
        for traced in self._traced.values():
            traced.loss.arguments.clear()
        self._traced.clear()
        self._drafts.clear()

    def asking(self, budget_bytes: int) -> WayPlanner:
        """Return a planner for the same batch and another budget, which rehearses nothing."""
        other = copy.copy(self)
        other.request = replace(self.request, budget_bytes=budget_bytes)
        other.is_rehearsing = False
        return other

    # -- drafts

    def draft(self, moves: Moves, size: int | None = None) -> Draft:
        """Return the draft of a (micro)batch that moves have shaped.

        Args:
            moves: in the order of their stages.
            size: rows of the microbatch; by default the whole batch, or the first microbatch.
        """
        moves = tuple(move for move in moves if move.stage > Stage.LOSS)  # the base has those
        size = self.sizes(moves)[0] if size is None else size
        if (size, moves) not in self._drafts:
            if moves and moves[-1].stage > Stage.BATCH:
                with of_package(moves[-1]):
                    draft = moves[-1].apply(self.draft(moves[:-1], size))
            else:
                draft = self._batched(moves)
                draft = draft.with_trace(self._trace(draft, size))
                if size is not None:
                    draft = draft.changed(whole=self.draft(()))
            self._drafts[size, moves] = draft
        return self._drafts[size, moves]

    def sizes(self, moves: Moves) -> list[int | None]:
        """Return the rows of each microbatch; of a batch that runs as a whole, [None]."""
        count = self.num_repeats(moves)
        return [None] if count == 1 else [num_rows(piece) for piece in split(self.batch, count)]

    def num_repeats(self, moves: Moves) -> int:
        """Return how often a (micro)batch runs for one update."""
        return self._batched(moves).num_repeats

    def _batched(self, moves: Moves) -> Draft:
        """Return the draft before it is traced."""
        draft = self.base
        for move in moves:
            if move.stage is Stage.BATCH:
                with of_package(move):
                    draft = move.apply(draft)
        return draft

    def _trace(self, draft: Draft, size: int | None) -> Traced:
        if size not in self._traced:
            pieces = [self.batch] if size is None else split(self.batch, draft.num_repeats)
            piece = next(p for p in pieces if size is None or num_rows(p) == size)

            def traced(loss_fn: LossFunction) -> Traced:
                if loss_fn is not draft.loss_fn:  # only to see whether it can be traced
                    capture = StepCapture(loss_fn, self.request.model)
                elif size not in self._captures:
                    capture = StepCapture(loss_fn, self.request.model, self._changing)
                    self._captures[size] = capture
                else:
                    capture = self._captures[size]
                return Traced(capture, capture.capture(fresh(piece)), size)

            with naming_failures():
                self._traced[size] = blaming_precision("the loss", draft.loss_fn, traced)
            self.costs.refuse_unread(self._traced[size].loss)
            refuse_unheard(self._traced[size].loss.joint, self._is_heard)
        return self._traced[size]

    def _is_heard(self, group_name: str) -> bool:
        """Whether a group's ranks are this step's.

        Of weights in parts, torch may have traced the group of an equal mesh that was made before.
        """
        request = self.request
        return group_name in request.spoken or (request.is_tensor_parallel and is_heard(group_name))

    def resident_bytes(self, moves: Moves) -> int:
        """Return what is in memory throughout the step."""
        return self.memory(self.draft(moves)).resident_bytes

    def is_full_untraced(self, moves: Moves) -> bool:
        """Whether a smaller batch leaves no room, as far as that shows before it is traced.

        What is accumulated is as large as the whole batch's gradients.
        """
        budget_bytes, whole = self.request.budget_bytes, self.draft(())
        if budget_bytes is None or whole.offered is not None or not moves:
            return False
        memory = self.memory(whole.changed(num_repeats=self.num_repeats(moves)))
        return memory.resident_bytes >= budget_bytes

    def left_bytes(self, moves: Moves) -> int | None:
        """Return what a schedule may allocate, with all on the disk that has to be there."""
        budget_bytes = self.request.budget_bytes
        if budget_bytes is None:
            return None
        draft = self.draft(moves)
        left_bytes = budget_bytes - self.memory(draft).resident_bytes
        if left_bytes <= budget_bytes // CHUNK_SHARE and draft.offered is not None:
            streaming = streamable(draft)
            left_bytes = budget_bytes - self.memory(draft, streaming).resident_bytes
        return left_bytes

    def memory(self, draft: Draft, streaming: Streaming | None = None) -> StepMemory:
        """Return the bytes of a draft outside of its schedule."""
        streaming = draft.streaming if streaming is None else streaming
        sharding = sharding_of(draft) if draft.reduction is None else draft.reduction.sharding
        sums_each = draft.reduction is None or draft.reduction.sums_each
        return self.costs.memory(
            self.batch, draft.loss, draft.num_repeats, streaming, sharding, sums_each
        )

    # -- ways

    def way(
        self, moves: Moves, *, rehearses: bool = False, hopeless_above: float | None = None
    ) -> Ready:
        """Return a way with its plans.

        Args:
            moves: in the order of their stages.
            rehearses: measure calls inside the step that were never seen there; else their times
                are estimated, as long as any others are known.
            hopeless_above: so many bytes for a single operation make a way hopeless; by default,
                more than the budget.

        Raises:
            InfeasibleBudgetError: in terms of the whole step.
            HopelessError: the way is hopeless.
        """
        if hopeless_above is None:
            budget_bytes = self.request.budget_bytes
            hopeless_above = math.inf if budget_bytes is None else budget_bytes
        sizes = self.sizes(moves)
        memory = self.memory(self.draft(moves))
        parts: list[ReadyPart] = []
        errors: list[InfeasibleBudgetError] = []
        for size in dict.fromkeys(sizes):
            draft = self.draft(moves, size)
            if self.partners is not None:
                self.partners.observe(moves, size)
            step = self.completed(draft)
            if parts and self.request.shards:  # with other ranks' parts all run one schedule
                parts.append(self._with_schedule_of(parts[0], draft, step))
                continue
            if memory.peak_bytes(least_peak_bytes(step.joint.graph)) > hopeless_above:
                raise HopelessError
            try:
                step, plan = self._planned(step, draft, memory, rehearses)
            except InfeasibleBudgetError as error:
                errors.append(error)  # the other size may need more
                continue
            parts.append(self.part(draft, step, plan))
        if errors:
            raise max(errors, key=lambda error: error.smallest_bytes)
        counts = [sizes.count(part.traced.num_rows) for part in parts]
        return self._ready(moves, parts, counts, memory)

    def _with_schedule_of(self, other: ReadyPart, draft: Draft, step: WholeStep) -> ReadyPart:
        """Return a smaller size of microbatch on the schedule of a larger one."""
        if order_digest(step.joint.graph) != order_digest(other.step.joint.graph):
            raise HopelessError
        try:
            return self.part(draft, step, judged(other.plan, step, draft))
        except (ScheduleError, IndexError):
            raise HopelessError from None

    def completed(self, draft: Draft) -> WholeStep:
        """Return a draft as a whole step."""
        measure = naming_missing_kernels(
            timing_collectives(self.profiler.measure, self.costs.exchanges),
            chosen_precision(self.request.allow),
        )
        joint = read_joint_graph(draft.graph_module, draft.loss.num_forward_outputs, measure)
        return self.costs.completed(joint, draft, self.profiler)

    def part(self, draft: Draft, step: WholeStep, plan: Plan) -> ReadyPart:
        """Return a planned size of microbatch."""
        assert draft.traced is not None
        return ReadyPart(
            draft.traced, step, replace(plan, num_microbatches=draft.num_repeats),
            self.costs.parameters(draft.loss.arguments),
            self.costs.moved_primals(draft.loss, draft.streaming, draft.reduction),
        )

    def _ready(
        self, moves: Moves, parts: Sequence[ReadyPart], counts: Sequence[int], memory: StepMemory
    ) -> Ready:
        draft = self.draft(moves)
        plans = tuple(_part_plan(part, n) for part, n in zip(parts, counts, strict=True))
        way = Way(
            moves=(*self.loss_moves, *moves),
            parts=plans,
            memory=memory,
            environment=environment(self.costs.device),
            finish_seconds=finish_seconds(draft, parts[0].parameter_of.values(), self.profiler),
            machine=draft.machine,
            words=self.words(moves),
        )
        return self.bound(way, parts)

    def bound(self, way: Way, parts: Sequence[ReadyPart]) -> Ready:
        """Return a way with the parts that run it here."""
        draft, microbatch = self.draft(way.moves), way.made(Microbatch)
        weight = None
        if isinstance(microbatch, Microbatch):
            weight = microbatch.loss_weight(self.draft(()))
        ready = Ready(
            way, tuple(parts), draft.gradients, draft.streaming, weight, draft.reduction
        )
        parallel = way.made(DataParallel)
        if isinstance(parallel, DataParallel):
            weight = parallel.loss_weight(self.draft(()))
            measure = measured(weight, self.batch)
            ready = replace(ready, rank_weight=weight, rank_measure=measure)
        return ready

    def words(self, moves: Moves) -> tuple[str, ...]:
        """Return what moves do, where that is to be told."""
        words = []
        for place, move in enumerate(moves):
            with of_package(move):
                if move.stage > Stage.LOSS:
                    words.append(move.describe(self.draft(moves[:place])))
        return tuple(filter(None, words))

    # -- times

    def _planned(
        self, step: WholeStep, draft: Draft, memory: StepMemory, rehearses: bool
    ) -> tuple[WholeStep, Plan]:
        """Return a step with the best times that can be had, and its plan."""
        request = self.request
        if not all(f is None or f.in_step_seconds is not None for f in step.joint.facts):
            if self.is_rehearsing and (rehearses or not self.profiler.has_seen_steps):
                step = self._rehearsed(step, memory, draft)
            else:
                step = replace(step, joint=with_estimated_seconds(step.joint, self.profiler))
        plan = plan_whole_step(
            step.joint.graph, memory, request.budget_bytes, draft.machine, _rows(draft)
        )
        return step, replace(plan, allowed=tuple(sorted(request.allow)))

    def _rehearsed(self, step: WholeStep, memory: StepMemory, draft: Draft) -> WholeStep:
        """Return a step with times measured inside it."""
        joint = step.joint
        graph = joint.graph.without_transfers()
        try:
            plan = plan_whole_step(
                graph, memory, self.request.budget_bytes, draft.machine, _rows(draft)
            )
        except InfeasibleBudgetError:
            if not step.joint.graph.transfers:
                raise
            return step  # only with transfers, which are not rehearsed
        if not fits(plan.peak_bytes, self.costs.device):
            return step
        if self.partners is not None:
            size, moves = next(key for key, known in self._drafts.items() if known is draft)
            seconds = self.partners.rehearse(moves, size, step, plan.schedule)
        else:
            seconds = self.rehearsal(draft, step, plan.schedule)
        seconds = in_known_terms(joint, seconds)
        for index, value in seconds.items():
            self.profiler.note_in_step(*joint.call(index), value)
        return replace(step, joint=joint.with_seconds(seconds))

    def rehearsal(self, draft: Draft, step: WholeStep, schedule: Schedule) -> dict[int, float]:
        """Return seconds of operations inside a step that runs a schedule without transfers."""
        tangents = [n.meta["val"] for n in step.joint.tangents]
        program = emit(step, schedule)
        device = self.costs.device
        with silent():
            seconds = rehearse(step.joint, program, draft.loss.arguments, tangents, device)
        nodes = step.joint.node_of_operation
        return {i: time for i, time in seconds.items() if nodes[i].target not in COLLECTIVES}


def _part_plan(part: ReadyPart, count: int) -> PartPlan:
    graph = part.step.joint.graph
    return PartPlan(
        part.traced.num_rows, count, structure_digest(graph), part.plan,
        sum(buffer not in graph.resting for buffer in part.written_buffers),
    )


def _rows(draft: Draft) -> int | None:
    """Return how many rows a microbatch has, None for a batch that runs as a whole."""
    return None if draft.traced is None else draft.traced.num_rows


def environment(device: torch.device) -> Environment:
    """Return where ways are found now."""
    return Environment(torch.__version__, device_name(device))
