"""From a batch's shapes and a budget to a step that can run: which moves, which schedule.

Every way to run the step (how many microbatches, the loss head in how many chunks, updates in the
backward or after it) is captured, completed to a `WholeStep` and planned by the one planner; the
fastest way that fits is taken. Ways that change how sums are rounded (microbatches, chunks) must be
faster by a margin than ways that keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from packlight.capture.batch_statistics import batch_statistics
from packlight.capture.chunk import chunked, find_heads
from packlight.capture.embedding import with_added_rows
from packlight.capture.joint import read_joint_graph
from packlight.capture.loss_weight import find_denominator
from packlight.capture.profiler import CallProfiler
from packlight.capture.whole_step import Consumption, WholeStep
from packlight.errors import BatchError, InfeasibleBudgetError, MicrobatchError
from packlight.planner import plan_whole_step
from packlight.runtime.independence import few_rows, settle
from packlight.runtime.microbatch import LossWeight, leaves_of_primals, num_rows, split
from packlight.runtime.offload.link import measure_link
from packlight.runtime.program import emit_program
from packlight.runtime.rehearse import fits, rehearse_program, typical_seconds
from packlight.runtime.step_capture import CapturedLoss, StepCapture
from packlight.runtime.step_costs import StepCosts, streamed_primals
from packlight.runtime.streamed import StreamedTensors, Streaming
from packlight.runtime.streamed_parameters import why_not_all
from packlight.runtime.ways import MICROBATCH_BATCH_NORM, Part, Request, Way
from packlight.step import Device, Plan, StepMemory

# How much faster a step that rounds its sums in another order must be. Times of one way and another
# are a few percent apart by chance, and what lies between calls is in none of them.
ROUNDING_MARGIN = 1.05
LINK_PROBE_BYTES = 16 * 2**20
# Parameters are streamed where all else takes this many times as long as the plain step.
MUCH_SLOWER = 2.0
# A chunk of the loss head gets about this share of what a schedule may allocate.
CHUNK_SHARE = 8


@dataclass
class _Captured:
    """One captured size of microbatch, while ways to run it are looked at."""

    batch: Any
    capture: StepCapture
    loss: CapturedLoss
    modules: dict[int, fx.GraphModule]


class Preparer:
    """Finds the fastest way to run a step within the budget, for one batch signature at a time."""

    def __init__(self, request: Request, streamed: StreamedTensors | None = None) -> None:
        self.request = request
        self.streamed = streamed
        self.costs = StepCosts(request)
        self.device = self.costs.device
        self._captured: dict[int | None, _Captured] = {}
        self._not_made: dict[str, str] = {}
        self._settled: LossWeight | None = None
        self._linked: Device | None = None
        directory = request.offload_directory
        if directory is not None and "offload" in request.moves:
            link = measure_link(directory, LINK_PROBE_BYTES)
            self._linked = Device(str(self.device), request.budget_bytes or 0, links=(link,))

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is a file's."""
        return self.streamed is not None and self.streamed.is_on_disk(tensor)

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
        found: list[Way] = []
        errors: list[InfeasibleBudgetError] = []
        hopeless: list[Callable[[], Way]] = []
        try:
            with CallProfiler(self.request.progress) as profiler:
                for num_microbatches in self._counts(batch):
                    num_errors = len(errors)
                    ways = self._ways(batch, num_microbatches, profiler, errors, hopeless)
                    if found and not ways and len(errors) == num_errors:
                        break  # gradients are accumulated: more microbatches hold no less
                    found.extend(ways)
                    if ways and self._is_enough(min(ways, key=lambda w: w.seconds), found):
                        break
                for make_way in hopeless if not found else ():
                    try:
                        found.append(make_way())
                    except InfeasibleBudgetError as error:
                        errors.append(error)
        finally:
            for captured in self._captured.values():
                captured.loss.arguments.clear()  # they would keep the example batch in memory
            self._captured.clear()
        if not found:
            raise self._with_reasons(min(errors, key=lambda error: error.smallest_bytes))
        way = min(found, key=_handicapped_seconds)
        not_made = dict(self._not_made)
        if way.num_microbatches == 1:
            not_made.setdefault("microbatch", "not needed")
        return replace(way, not_made=not_made)

    def _is_enough(self, way: Way, found: Sequence[Way]) -> bool:
        return way.is_plain or way.seconds > 1.1 * min(w.seconds for w in found)

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
        hopeless: list[Callable[[], Way]],
    ) -> list[Way]:
        """Return ways with a number of microbatches: the loss head whole, and in chunks.

        Those that hold more than the budget before they start are left in `hopeless`: how much more
        takes long to find out, and matters only if nothing fits.
        """
        found: list[Way] = []
        for num_chunks in self._chunk_counts(batch, num_microbatches, found):
            for streaming in self._streamings(batch, num_microbatches, found):
                make_way = partial(
                    self._way, batch, num_microbatches, num_chunks, streaming, profiler
                )
                if self._is_hopeless(batch, num_microbatches, streaming):
                    hopeless.append(make_way)
                    continue
                try:
                    found.append(make_way())
                except InfeasibleBudgetError as error:
                    errors.append(error)
        return found

    def _is_hopeless(self, batch: Any, num_microbatches: int, streaming: Streaming) -> bool:
        budget_bytes = self.request.budget_bytes
        if budget_bytes is None:
            return False
        captured = self._capture_first(batch, num_microbatches)
        memory = self.costs.memory(batch, captured.loss, num_microbatches, streaming)
        return memory.resident_bytes >= budget_bytes

    def _streamings(
        self, batch: Any, num_microbatches: int, found: Sequence[Way]
    ) -> Iterator[Streaming]:
        """Yield what could lie on the disk: nothing, optimizer state, parameters as well."""
        yield Streaming()
        if self._linked is None or any(way.is_plain for way in found):
            return
        if num_microbatches > 1 and found:
            return
        all_of_it = self._streamable(batch, num_microbatches)
        if all_of_it.states:
            yield Streaming(all_of_it.states)
        if any(way.slowdown < MUCH_SLOWER for way in found):
            return
        reason = why_not_all(self.request.model, all_of_it.parameters)
        if reason is not None:
            self._not_made["streaming all parameters"] = reason
        if all_of_it.parameters:
            yield all_of_it

    def _streamable(self, batch: Any, num_microbatches: int) -> Streaming:
        """Return all that could lie on the disk: what is updated together, cannot."""
        if self._linked is None:
            return Streaming()
        how = self._consumption(num_microbatches)
        is_one_by_one = how is Consumption.UPDATE or (
            how is Consumption.ACCUMULATE and self.costs.steps_alone
        )
        states = self.costs.state_slots() if is_one_by_one else {}
        loss = self._capture_first(batch, num_microbatches).loss
        parameters = self.costs.parameter_slots(loss, how)
        return Streaming(states if any(states.values()) else {}, parameters)

    def _consumption(self, num_microbatches: int) -> Consumption:
        if num_microbatches > 1:
            return Consumption.ACCUMULATE
        if "update-in-backward" in self._not_made:
            return Consumption.TOGETHER
        return Consumption.UPDATE

    def _chunk_counts(
        self, batch: Any, num_microbatches: int, found: Sequence[Way]
    ) -> Iterator[int]:
        yield 1
        if "chunk" not in self.request.moves:
            self._not_made["chunk"] = "not among the moves"
            return
        if any(way.is_plain for way in found):
            return
        captured = self._capture_first(batch, num_microbatches)
        regions = find_heads(captured.loss.joint, captured.loss.num_forward_outputs)
        if not regions:
            self._not_made["chunk"] = "no loss head found that could run in chunks"
            return
        budget_bytes = self.request.budget_bytes
        assert budget_bytes is not None, "without a budget the plain step fits"
        memory = self.costs.memory(batch, captured.loss, num_microbatches)
        left = budget_bytes - memory.resident_bytes
        if left <= budget_bytes // CHUNK_SHARE:  # only what streams has room for a head at all
            streaming = self._streamable(batch, num_microbatches)
            memory = self.costs.memory(batch, captured.loss, num_microbatches, streaming)
            left = budget_bytes - memory.resident_bytes
        count = 2
        while count < regions[0].rows and regions[0].bytes * CHUNK_SHARE > left * count > 0:
            count *= 2
        yield min(count, regions[0].rows)
        if not found and count < regions[0].rows:
            yield min(4 * count, regions[0].rows)

    def _way(
        self,
        batch: Any,
        num_microbatches: int,
        num_chunks: int,
        streaming: Streaming,
        profiler: CallProfiler,
    ) -> Way:
        how = self._consumption(num_microbatches)
        pieces = split(batch, num_microbatches) if num_microbatches > 1 else [batch]
        sizes = [num_rows(p) if num_microbatches > 1 else None for p in pieces]
        parts: list[Part] = []
        memory: StepMemory | None = None
        for size in dict.fromkeys(sizes):
            captured = self._capture(pieces[sizes.index(size)], num_microbatches)
            trained = self.costs.parameters(captured.loss.arguments)
            memory = memory or self.costs.memory(batch, captured.loss, num_microbatches, streaming)
            step, plan = self._planned(captured, how, num_chunks, streaming, memory, profiler)
            streamed = streamed_primals(captured.loss, streaming)
            parts.append(
                Part(size, captured.capture, captured.loss, step, plan, trained, streamed)
            )
        assert memory is not None
        finish_seconds, loss_weight = 0.0, None
        if num_microbatches > 1:
            loss_weight = self._settled
            if self.costs.steps_alone:
                updated = parts[0].parameter_of.values()
                finish_seconds = sum(
                    self.costs.update(p, None, profiler).seconds + self._moved_seconds(p, streaming)
                    for p in updated
                )
        counts = tuple(sizes.count(part.num_rows) for part in parts)
        return Way(
            tuple(parts), counts, memory, how, finish_seconds, num_chunks, loss_weight, streaming,
            self._linked, len(list(self.request.model.parameters())),
        )

    def _moved_seconds(self, parameter: nn.Parameter, streaming: Streaming) -> float:
        """Return how long an update after the last schedule waits for its parameter and state."""
        if not streaming:
            return 0.0
        assert self._linked is not None
        link = self._linked.links[0]
        sizes = [spec.num_bytes for spec in streaming.of_update(parameter)]
        return sum(link.read_seconds(size) + link.write_seconds(size) for size in sizes)

    # -- captures

    def _capture_first(self, batch: Any, num_microbatches: int) -> _Captured:
        piece = batch if num_microbatches == 1 else split(batch, num_microbatches)[0]
        return self._capture(piece, num_microbatches)

    def _capture(self, piece: Any, num_microbatches: int) -> _Captured:
        size = None if num_microbatches == 1 else num_rows(piece)
        if size not in self._captured:
            capture = StepCapture(self.request.loss_fn, self.request.model)
            loss = capture.capture(piece)
            self._captured[size] = _Captured(piece, capture, loss, {1: loss.joint})
        return self._captured[size]

    def _planned(
        self,
        captured: _Captured,
        how: Consumption,
        num_chunks: int,
        streaming: Streaming,
        memory: StepMemory,
        profiler: CallProfiler,
    ) -> tuple[WholeStep, Plan]:
        """Return a captured size as a whole step with its plan, times measured inside the step."""
        loss = captured.loss
        if num_chunks not in captured.modules:
            region = find_heads(loss.joint, loss.num_forward_outputs)[0]
            in_chunks = chunked(loss.joint, region, min(num_chunks, region.rows))
            captured.modules[num_chunks] = with_added_rows(in_chunks)
        joint = read_joint_graph(
            captured.modules[num_chunks], loss.num_forward_outputs, profiler.measure
        )
        step = self.costs.completed(joint, loss, how, streaming, profiler)
        step = self._rehearsed(step, memory, loss, profiler)
        budget_bytes = self.request.budget_bytes
        return step, plan_whole_step(step.joint.graph, memory, budget_bytes, self._linked)

    def _rehearsed(
        self, step: WholeStep, memory: StepMemory, loss: CapturedLoss, profiler: CallProfiler
    ) -> WholeStep:
        """Return a step with times measured inside it, if they are not known yet."""
        joint = step.joint
        if all(f is None or f.in_step_seconds is not None for f in joint.facts):
            return step
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
