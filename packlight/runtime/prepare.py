"""From a batch's shapes and a budget to a step that can run: which moves, which schedule.

Every way to run the step (how many microbatches, the loss head in how many chunks, updates in the
backward or after it) is captured, completed to a `WholeStep` and planned by the one planner; the
fastest way that fits is taken. Ways that change how sums are rounded (microbatches, chunks) must be
faster by a margin than ways that keep every bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from packlight.capture.batch_statistics import batch_statistics
from packlight.capture.chunk import chunked, find_heads
from packlight.capture.embedding import with_added_rows
from packlight.capture.joint import JointStep, read_joint_graph
from packlight.capture.loss_weight import find_denominator
from packlight.capture.measure import median_seconds
from packlight.capture.profiler import CallProfiler
from packlight.capture.whole_step import Consumer, Consumption, WholeStep, whole_step
from packlight.errors import BatchError, InfeasibleBudgetError, MicrobatchError
from packlight.planner import plan_whole_step
from packlight.runtime.accounting import batch_bytes, measure_optimizer, tensors_bytes, tensors_of
from packlight.runtime.gradients import fills_storage
from packlight.runtime.independence import few_rows, settle
from packlight.runtime.microbatch import LossWeight, leaves_of_primals, num_rows, split
from packlight.runtime.offload.link import measure_link
from packlight.runtime.program import emit_program
from packlight.runtime.rehearse import fits, rehearse_program, typical_seconds
from packlight.runtime.step_capture import CapturedLoss, StepCapture
from packlight.runtime.streamed_state import Slots, StreamedState, state_slots
from packlight.runtime.twin import kinds_of_settings
from packlight.runtime.update import ParameterUpdates, UpdateCost
from packlight.runtime.ways import MICROBATCH_BATCH_NORM, Part, Request, Way
from packlight.step import Device, Plan, StepMemory

# How much faster a step that rounds its sums in another order must be.
ROUNDING_MARGIN = 1.02
# Loss, its weight and their sums: 0-dimensional tensors outside of the schedule.
SCALAR_BYTES = 64
LINK_PROBE_BYTES = 16 * 2**20
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

    def __init__(self, request: Request) -> None:
        self.request = request
        model, optimizer = request.model, request.optimizer
        self.device = next(model.parameters()).device
        self.updates: ParameterUpdates | None = None
        self.optimizer_bytes = self.update_workspace_bytes = 0
        if optimizer is not None:
            measured = measure_optimizer(optimizer)
            self.optimizer_bytes = measured.state_bytes
            self.update_workspace_bytes = measured.workspace_bytes
            self.updates = ParameterUpdates(optimizer)
        self.name_of = {id(p): name for name, p in model.named_parameters()}
        self.trained = {
            id(p): p
            for group in (optimizer.param_groups if optimizer else [{"params": model.parameters()}])
            for p in group["params"]
            if p.requires_grad
        }
        self._captured: dict[int | None, _Captured] = {}
        self._not_made: dict[str, str] = {}
        self._settled: LossWeight | None = None
        self._additions: dict[Any, float] = {}
        self._consumers: dict[Any, Consumer] = {}
        self._slots: Slots | None = None
        self.streamed: StreamedState | None = None
        self._linked: Device | None = None
        directory = request.offload_directory
        if directory is not None and "offload" in request.moves:
            link = measure_link(directory, LINK_PROBE_BYTES)
            self._linked = Device(str(self.device), request.budget_bytes or 0, links=(link,))

    @property
    def trained_in_order(self) -> list[nn.Parameter]:
        """The trained parameters in the model's order, that of a loop's `clip_grad_norm_`."""
        return [p for p in self.request.model.parameters() if id(p) in self.trained]

    @property
    def steps_alone(self) -> bool:
        """Whether parameters may be updated one at a time."""
        no_norm = self.request.clipping.norm is None and self.request.scaler is None
        return self.updates is not None and self.updates.refusal is None and no_norm

    def _why_no_update_in_backward(self) -> str | None:
        request = self.request
        if "update-in-backward" not in request.moves:
            return "not among the moves"
        if self.updates is None:
            return "there is no optimizer"
        if request.clipping.norm is not None:
            return (
                "clipping by the norm of all gradients needs all of them first (clip_grad_value "
                "does not)"
            )
        if request.scaler is not None:
            return "the loss scaler looks at all gradients before it lets the optimizer step"
        return self.updates.refusal

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
        try:
            with CallProfiler(self.request.progress) as profiler:
                for num_microbatches in self._counts(batch):
                    ways = self._ways(batch, num_microbatches, profiler, errors)
                    found.extend(ways)
                    if ways and self._is_enough(min(ways, key=lambda w: w.seconds), found):
                        break
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
    ) -> list[Way]:
        """Return ways with a number of microbatches: the loss head whole, and in chunks."""
        found: list[Way] = []
        may_stream = (
            self._linked is not None and num_microbatches == 1 and self.optimizer_bytes > 0
            and "update-in-backward" not in self._not_made
        )
        for num_chunks in self._chunk_counts(batch, num_microbatches, found):
            for streams_state in (False, True) if may_stream else (False,):
                if streams_state and any(way.is_plain for way in found):
                    break
                try:
                    found.append(
                        self._way(batch, num_microbatches, num_chunks, streams_state, profiler)
                    )
                except InfeasibleBudgetError as error:
                    errors.append(error)
        return found

    def _chunk_counts(
        self, batch: Any, num_microbatches: int, found: Sequence[Way]
    ) -> Iterator[int]:
        yield 1
        if "chunk" not in self.request.moves:
            self._not_made["chunk"] = "not among the moves"
            return
        if any(way.is_plain for way in found):
            return
        captured = self._capture(split(batch, num_microbatches)[0], num_microbatches)
        regions = find_heads(captured.loss.joint, captured.loss.num_forward_outputs)
        if not regions:
            self._not_made["chunk"] = "no loss head found that could run in chunks"
            return
        budget_bytes = self.request.budget_bytes
        assert budget_bytes is not None, "without a budget the plain step fits"
        left = budget_bytes - self._memory(batch, captured.loss, num_microbatches).resident_bytes
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
        streams_state: bool,
        profiler: CallProfiler,
    ) -> Way:
        if num_microbatches > 1:
            how = Consumption.ACCUMULATE
        elif "update-in-backward" in self._not_made:
            how = Consumption.TOGETHER
        else:
            how = Consumption.UPDATE
        pieces = split(batch, num_microbatches) if num_microbatches > 1 else [batch]
        sizes = [num_rows(p) if num_microbatches > 1 else None for p in pieces]
        parts: list[Part] = []
        memory: StepMemory | None = None
        for size in dict.fromkeys(sizes):
            captured = self._capture(pieces[sizes.index(size)], num_microbatches)
            trained = self._parameters(captured.loss.arguments)
            slots = self._state_slots() if streams_state else {}
            memory = memory or self._memory(batch, captured.loss, num_microbatches, slots)
            step, plan = self._planned(captured, how, num_chunks, slots, memory, profiler)
            parts.append(Part(size, captured.capture, captured.loss, step, plan, trained))
        assert memory is not None
        finish_seconds, loss_weight = 0.0, None
        if num_microbatches > 1:
            loss_weight = self._settled
            if self.steps_alone:
                assert self.updates is not None
                updated = parts[0].parameter_of.values()
                finish_seconds = sum(self._update_cost(p, None, profiler).seconds for p in updated)
        counts = tuple(sizes.count(part.num_rows) for part in parts)
        return Way(
            tuple(parts), counts, memory, how, finish_seconds, num_chunks, loss_weight, slots,
            self._linked,
        )

    def _state_slots(self) -> Slots:
        assert self.request.optimizer is not None
        if self._slots is None:
            self._slots = state_slots(self.request.optimizer, self.trained.values())
        return self._slots

    # -- captures

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
        slots: Slots,
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
        step = self._completed(joint, loss, how, slots, profiler)
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

    def _completed(
        self,
        joint: JointStep,
        loss: CapturedLoss,
        how: Consumption,
        slots: Slots,
        profiler: CallProfiler,
    ) -> WholeStep:
        consumers: dict[int, Consumer] = {}
        trained = self._parameters(loss.arguments)
        copied_bytes = _copied_bytes(joint, trained)
        for primal, parameter in trained.items():
            consumer = self._consumer(joint, primal, parameter, how, profiler)
            if slots:  # only what is streamed has a buffer of its own
                streamed_bytes = sum(spec.num_bytes for spec in slots[parameter].values())
                consumer = replace(consumer, state_bytes=streamed_bytes)
            workspace = consumer.workspace_bytes + copied_bytes.get(primal, 0)
            consumers[primal] = replace(consumer, workspace_bytes=workspace)
        together = None
        if how is Consumption.TOGETHER:
            seconds = sum(consumer.seconds for consumer in consumers.values())
            norms_bytes = SCALAR_BYTES * len(consumers) if self.request.clipping.norm else 0
            workspace = max(self.update_workspace_bytes, norms_bytes) + sum(copied_bytes.values())
            together = Consumer("all parameters", seconds, workspace)
        step = whole_step(joint, consumers, how, together)
        if not slots:
            return step
        stored = tuple(step.state_buffer_of.values())
        graph = replace(step.joint.graph, stored=stored)
        return replace(step, joint=replace(step.joint, graph=graph))

    def _consumer(
        self,
        joint: JointStep,
        primal: int,
        parameter: nn.Parameter,
        how: Consumption,
        profiler: CallProfiler,
    ) -> Consumer:
        name = self.name_of[id(parameter)]
        node = joint.backward_results[primal]
        if node is None:
            return Consumer(name)
        if how is Consumption.ACCUMULATE:
            return Consumer(name, self._addition_seconds(parameter, profiler))
        if self.updates is None or self.updates.refusal is not None:
            return Consumer(name)
        key = (name, tuple(node.meta["val"].stride()))
        if key not in self._consumers:  # later on, its state may lie elsewhere
            cost = self._update_cost(parameter, key[1], profiler)
            workspace = cost.workspace_bytes
            self._consumers[key] = Consumer(name, cost.seconds, workspace, cost.state_bytes)
        return self._consumers[key]

    def _update_cost(
        self, parameter: nn.Parameter, stride: tuple[int, ...] | None, profiler: CallProfiler
    ) -> UpdateCost:
        """Return what an update costs, seconds as they were first seen on this device."""
        assert self.updates is not None
        cost = self.updates.cost(parameter, stride)
        optimizer = self.updates.optimizer
        name = (
            f"update {type(optimizer)} {kinds_of_settings(optimizer)} {tuple(parameter.shape)} "
            f"{parameter.dtype} {stride or parameter.stride()} in {cost.num_slices}"
        )
        return replace(cost, seconds=profiler.remembered_seconds(name, self.device, cost.seconds))

    def _addition_seconds(self, parameter: nn.Parameter, profiler: CallProfiler) -> float:
        """Return how long a gradient takes to be added to another one."""
        key = (tuple(parameter.shape), parameter.dtype)
        if key not in self._additions:
            one, other = parameter.new_zeros(parameter.shape), parameter.new_zeros(parameter.shape)
            seconds = median_seconds(lambda: one.add_(other), self.device)
            name = f"addition {key}"
            self._additions[key] = profiler.remembered_seconds(name, self.device, seconds)
        return self._additions[key]

    def _parameters(self, arguments: Sequence[Any]) -> dict[int, nn.Parameter]:
        """Return the trained parameters among a captured call's inputs, by position."""
        return {i: self.trained[id(a)] for i, a in enumerate(arguments) if id(a) in self.trained}

    # -- memory outside of schedules

    def _memory(
        self,
        batch: Any,
        loss: CapturedLoss,
        num_microbatches: int,
        slots: Slots | None = None,
    ) -> StepMemory:
        model = self.request.model
        trained = self._parameters(loss.arguments)
        results = next(n for n in reversed(loss.joint.graph.nodes) if n.op == "output").args[0]
        gradients = results[loss.num_forward_outputs :]
        gradient_bytes = sum(p.nbytes for i, p in trained.items() if gradients[i] is not None)
        streamed = [spec for named in (slots or {}).values() for spec in named.values()]
        streamed_bytes = sum(spec.num_bytes for spec in streamed)
        accumulated_bytes = workspace_bytes = 0
        if num_microbatches > 1:
            written = [loss.arguments[primal] for primal in loss.written_back.values()]
            accumulated_bytes = gradient_bytes + tensors_bytes(written)
            workspace_bytes = self.update_workspace_bytes
            if self.steps_alone:
                assert self.updates is not None
                costs = [self.updates.cost(p).workspace_bytes for p in trained.values()]
                workspace_bytes = max(costs, default=0)
        # What the loss reads beside: the model's buffers, a teacher's weights, classes' weights.
        outside = [*model.parameters(), *tensors_of(batch)]
        others = [*model.buffers(), *(a for a in loss.arguments if isinstance(a, torch.Tensor))]
        return StepMemory(
            parameter_bytes=tensors_bytes(model.parameters()),
            state_bytes=tensors_bytes([*outside, *others]) - tensors_bytes(outside),
            input_bytes=batch_bytes(batch) + SCALAR_BYTES,
            optimizer_bytes=self.optimizer_bytes - streamed_bytes,
            update_workspace_bytes=workspace_bytes,
            gradient_bytes=gradient_bytes,
            accumulated_bytes=accumulated_bytes,
        )

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


def _copied_bytes(joint: JointStep, trained: Mapping[int, nn.Parameter]) -> dict[int, int]:
    """Return the sizes of gradients that share their storage and are copied: primal -> bytes.

    Two parameters that are only ever added have one gradient, those that are concatenated have
    slices of one, and that of a sum is one number.
    """
    nodes = {p: node for p in trained if isinstance(node := joint.backward_results[p], fx.Node)}
    num_sharing = Counter(joint.buffer_of_node[node] for node in nodes.values())
    return {
        primal: trained[primal].nbytes
        for primal, node in nodes.items()
        if num_sharing[joint.buffer_of_node[node]] > 1 or not fills_storage(node.meta["val"])
    }


def _handicapped_seconds(way: Way) -> float:
    return way.seconds * (1.0 if way.is_bit_exact else ROUNDING_MARGIN)
