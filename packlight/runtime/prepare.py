"""From a batch's shapes and a budget to a step that can run: which moves, which schedule.

Every way to run the step (how many microbatches, loss head and layers in how many chunks, updates
in the backward or after it) is captured, completed to a `WholeStep` and planned by the one planner;
the fastest way that fits is taken. Ways that change how sums are rounded (microbatches, chunks)
must be faster by a margin than ways that keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from packlight.capture.batch_statistics import batch_statistics
from packlight.capture.joint import read_joint_graph
from packlight.capture.loss_weight import find_denominator
from packlight.capture.profiler import CallProfiler
from packlight.capture.whole_step import Consumption, WholeStep
from packlight.errors import BatchError, InfeasibleBudgetError, MicrobatchError
from packlight.planner import plan_whole_step
from packlight.runtime.independence import few_rows, settle
from packlight.runtime.microbatch import LossWeight, leaves_of_primals, num_rows, split
from packlight.runtime.offload.link import measure_link
from packlight.runtime.precision import blaming_precision, naming_missing_kernels
from packlight.runtime.program import emit_program
from packlight.runtime.rehearse import (
    fits,
    rehearse_program,
    typical_seconds,
    with_estimated_seconds,
)
from packlight.runtime.rewriting import Rewriter
from packlight.runtime.step_capture import CapturedLoss, LossFunction, StepCapture
from packlight.runtime.step_costs import StepCosts
from packlight.runtime.streamed_state import Slots, StreamedState
from packlight.runtime.ways import (
    MICROBATCH_BATCH_NORM,
    ROUNDING_MARGIN,
    Part,
    Request,
    Rewriting,
    Way,
)
from packlight.step import Device, Plan, StepMemory

LINK_PROBE_BYTES = 16 * 2**20


@dataclass
class _Captured:
    """One captured size of microbatch, while ways to run it are looked at."""

    batch: Any
    capture: StepCapture
    loss: CapturedLoss
    rewriter: Rewriter


@dataclass(frozen=True)
class _Choice:
    """What tells one way to run the step from another.

    Attributes:
        num_microbatches: per update.
        rewriting: of the captured graph.
        streams_state: whether optimizer state lies on a tier between updates.
    """

    num_microbatches: int
    rewriting: Rewriting
    streams_state: bool


class Preparer:
    """Finds the fastest way to run a step within the budget, for one batch signature at a time."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.costs = StepCosts(request)
        self.device = self.costs.device
        self._captured: dict[int | None, _Captured] = {}
        self._not_made: dict[str, str] = {}
        self._settled: LossWeight | None = None
        self.streamed: StreamedState | None = None
        self._linked: Device | None = None
        directory = request.offload_directory
        if directory is not None and "offload" in request.moves:
            link = measure_link(directory, LINK_PROBE_BYTES)
            self._linked = Device(str(self.device), request.budget_bytes or 0, links=(link,))

    def _why_no_update_in_backward(self) -> str | None:
        request = self.request
        if "update-in-backward" not in request.moves:
            return "not among the moves"
        if self.costs.updates is None:
            return "there is no optimizer"
        if request.clipping.norm is not None:
            return (
                "clipping by the norm of all gradients needs all of them first (clip_grad_value "
                "does not)"
            )
        if request.scaler is not None:
            return "the loss scaler looks at all gradients before it lets the optimizer step"
        return self.costs.updates.refusal

    # -- ways

    def prepare(self, batch: Any) -> Way:
        """Return the fastest way found to train on a batch like this within the budget.

        Raises:
            InfeasibleBudgetError: with the smallest whole-step budget of all ways looked at.
        """
        self._captured.clear()
        self._not_made, self._settled = {}, None
        reason = self._why_no_update_in_backward()
        if reason is not None:
            self._not_made["update-in-backward"] = reason
        found: dict[_Choice, Way] = {}
        errors: list[InfeasibleBudgetError] = []
        try:
            with CallProfiler(self.request.progress) as profiler:
                for num_microbatches in self._counts(batch):
                    ways = self._ways(batch, num_microbatches, profiler, errors)
                    found.update(ways)
                    if ways and self._is_enough(ways.values(), found.values()):
                        break
                if found:
                    way = self._fastest(batch, found, profiler)
        finally:
            for captured in self._captured.values():
                captured.loss.arguments.clear()  # they would keep the example batch in memory
            self._captured.clear()
        if not found:
            raise self._with_reasons(min(errors, key=lambda error: error.smallest_bytes))
        not_made = dict(self._not_made)
        if way.num_microbatches == 1:
            not_made.setdefault("microbatch", "not needed")
        return replace(way, not_made=not_made)

    def _is_enough(self, latest: Iterable[Way], found: Iterable[Way]) -> bool:
        way = min(latest, key=lambda w: w.seconds)
        return way.is_plain or way.seconds > 1.1 * min(w.seconds for w in found)

    def _fastest(self, batch: Any, found: dict[_Choice, Way], profiler: CallProfiler) -> Way:
        """Return the fastest of the ways found; what is measured inside the step decides.

        A rehearsal takes several steps, so only ways that may win are rehearsed. The others stay
        with times estimated from calls alone.
        """
        rehearsed: set[_Choice] = set()
        while True:
            choice = min(found, key=lambda c: _handicapped_seconds(found[c]))
            if choice in rehearsed:
                return found[choice]
            rehearsed.add(choice)
            found[choice] = self._way(batch, choice, profiler, rehearses=True)

    def _with_reasons(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        hints = [f"without {name}: {why}" for name, why in self._not_made.items()]
        hint = "\n  ".join(filter(None, [error.hint, *hints]))
        return InfeasibleBudgetError(
            error.budget_bytes, error.smallest_bytes, error.peak_operation, error.peak_buffers, hint
        )

    def _counts(self, batch: Any) -> Iterator[int]:
        """Yield numbers of microbatches to look at, as long as they are possible."""
        yield 1
        if "microbatch" not in self.request.moves:
            self._not_made["microbatch"] = "not among the moves"
            return
        try:
            rows = num_rows(batch)
        except BatchError as error:
            self._not_made["microbatch"] = str(error)
            return
        count = 2
        while count < 2 * rows:
            if not self._may_split(batch):
                return
            yield min(count, rows)
            count *= 2

    def _ways(
        self,
        batch: Any,
        num_microbatches: int,
        profiler: CallProfiler,
        errors: list[InfeasibleBudgetError],
    ) -> dict[_Choice, Way]:
        """Return ways with a number of microbatches: all whole, and parts in chunks."""
        found: dict[_Choice, Way] = {}
        may_stream = (
            self._linked is not None and num_microbatches == 1 and self.costs.optimizer_bytes > 0
            and "update-in-backward" not in self._not_made
        )
        rewriter = self._capture_first(batch, num_microbatches).rewriter
        rewritten: dict[Rewriting, Way] = {}
        for rewriting in rewriter.candidates(rewritten):
            for streams_state in (False, True) if may_stream else (False,):
                if streams_state and any(way.is_plain for way in found.values()):
                    break
                choice = _Choice(num_microbatches, rewriting, streams_state)
                try:
                    found[choice] = rewritten[rewriting] = self._way(batch, choice, profiler)
                except InfeasibleBudgetError as error:
                    errors.append(error)
        self._not_made.update(rewriter.why_not)
        return found

    def _way(
        self,
        batch: Any,
        choice: _Choice,
        profiler: CallProfiler,
        *,
        rehearses: bool = False,
    ) -> Way:
        num_microbatches = choice.num_microbatches
        if num_microbatches > 1:
            how = Consumption.ACCUMULATE
        elif "update-in-backward" in self._not_made:
            how = Consumption.TOGETHER
        else:
            how = Consumption.UPDATE
        pieces = split(batch, num_microbatches) if num_microbatches > 1 else [batch]
        sizes = [num_rows(p) if num_microbatches > 1 else None for p in pieces]
        parts: list[Part] = []
        layers: dict[str, int] = {}
        memory: StepMemory | None = None
        for size in dict.fromkeys(sizes):
            captured = self._capture(pieces[sizes.index(size)], batch, num_microbatches)
            trained = self.costs.parameters(captured.loss.arguments)
            slots = self.costs.state_slots() if choice.streams_state else {}
            memory = memory or self.costs.memory(batch, captured.loss, num_microbatches, slots)
            step, plan = self._planned(
                captured, how, choice.rewriting, slots, memory, profiler, rehearses
            )
            layers = layers or captured.rewriter.layers(choice.rewriting)
            parts.append(Part(size, captured.capture, captured.loss, step, plan, trained))
        assert memory is not None
        finish_seconds, loss_weight = 0.0, None
        if num_microbatches > 1:
            loss_weight = self._settled
            if self.costs.steps_alone:
                updated = parts[0].parameter_of.values()
                finish_seconds = sum(self.costs.update(p, None, profiler).seconds for p in updated)
        counts = tuple(sizes.count(part.num_rows) for part in parts)
        return Way(
            tuple(parts), counts, memory, how, finish_seconds, choice.rewriting, layers,
            loss_weight, slots, self._linked,
        )

    # -- captures

    def _capture_first(self, batch: Any, num_microbatches: int) -> _Captured:
        piece = batch if num_microbatches == 1 else split(batch, num_microbatches)[0]
        return self._capture(piece, batch, num_microbatches)

    def _capture(self, piece: Any, batch: Any, num_microbatches: int) -> _Captured:
        size = None if num_microbatches == 1 else num_rows(piece)
        if size not in self._captured:
            def captured(loss_fn: LossFunction) -> tuple[StepCapture, CapturedLoss]:
                capture = StepCapture(loss_fn, self.request.model)
                return capture, capture.capture(piece)

            capture, loss = blaming_precision("the loss", self.request.loss_fn, captured)
            left_bytes = self.request.budget_bytes
            if left_bytes is not None:
                memory = self.costs.memory(batch, loss, num_microbatches)
                left_bytes -= memory.resident_bytes
            rewriter = Rewriter(loss, left_bytes, self.request.moves)
            self._captured[size] = _Captured(piece, capture, loss, rewriter)
        return self._captured[size]

    def _planned(
        self,
        captured: _Captured,
        how: Consumption,
        rewriting: Rewriting,
        slots: Slots,
        memory: StepMemory,
        profiler: CallProfiler,
        rehearses: bool,
    ) -> tuple[WholeStep, Plan]:
        """Return a captured size as a whole step with its plan.

        Where calls were never seen inside a step, it is rehearsed, or their times are estimated.
        """
        loss = captured.loss
        module = captured.rewriter.module(rewriting)
        measure = naming_missing_kernels(profiler.measure, self.request.precision)
        joint = read_joint_graph(module, loss.num_forward_outputs, measure)
        step = self.costs.completed(joint, loss, how, slots, profiler)
        if not all(f is None or f.in_step_seconds is not None for f in joint.facts):
            if rehearses or not profiler.has_seen_steps:
                step = self._rehearsed(step, memory, loss, profiler)
            else:
                step = replace(step, joint=with_estimated_seconds(step.joint, profiler))
        budget_bytes = self.request.budget_bytes
        plan = plan_whole_step(step.joint.graph, memory, budget_bytes, self._linked)
        return step, replace(plan, allowed=tuple(sorted(self.request.allow)))

    def _rehearsed(
        self, step: WholeStep, memory: StepMemory, loss: CapturedLoss, profiler: CallProfiler
    ) -> WholeStep:
        """Return a step with times measured inside it."""
        joint = step.joint
        graph = replace(joint.graph, stored=())
        budget_bytes = self.request.budget_bytes
        try:
            plan = plan_whole_step(graph, memory, budget_bytes)
        except InfeasibleBudgetError:
            if self._linked is None:
                raise
            return step  # only with transfers, which are not rehearsed
        if not fits(plan.peak_bytes, self.device):
            return step
        tangents = [n.meta["val"] for n in joint.tangents]
        program = emit_program(step, plan.schedule)
        seconds = rehearse_program(program, loss.arguments, tangents, self.device)
        typical = typical_seconds(joint, seconds)
        for index, value in typical.items():
            profiler.note_in_step(*joint.call(index), value)
        return replace(step, joint=joint.with_seconds(typical))

    # -- microbatches

    def _may_split(self, batch: Any) -> bool:
        """Whether microbatches give the whole batch's gradients; remembers why not."""
        if self._settled is None and "microbatch" not in self._not_made:
            try:
                self._settled = self._find_loss_weight(batch)
            except (MicrobatchError, BatchError) as error:
                self._not_made["microbatch"] = str(error)
        return self._settled is not None

    def _find_loss_weight(self, batch: Any) -> LossWeight:
        request = self.request
        captured = self._captured[None]
        loss = captured.loss
        rows = num_rows(batch)
        statistics = batch_statistics(loss.joint, rows)
        if statistics and MICROBATCH_BATCH_NORM not in request.allow:
            raise MicrobatchError(
                f"{statistics[0]} and {len(statistics) - 1} other layers normalise over the batch",
                hint=f"allow={{{MICROBATCH_BATCH_NORM!r}}} lets them normalise over microbatches",
            )
        weight: LossWeight
        if request.loss_weight is not None:
            weight = request.loss_weight
        else:
            leaf_of = leaves_of_primals(loss.arguments, captured.batch)
            weight = find_denominator(
                loss.joint, loss.num_forward_outputs, rows, leaf_of, loss.arguments
            )
        # Few rows: this forward is eager PyTorch's and in nobody's plan.
        rows_looked_at = few_rows(batch, weight, max_rows=2 if rows <= 8 else 4)
        return settle(request.model, request.loss_fn, rows_looked_at, weight)


def _handicapped_seconds(way: Way) -> float:
    return way.seconds * (1.0 if way.is_bit_exact else ROUNDING_MARGIN)
