"""What a step costs beside the calls of its graph: updates, additions, everything resident."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from packlight.capture.batch import tensors_of
from packlight.capture.joint import JointStep
from packlight.capture.reduced import with_reductions
from packlight.capture.step_capture import CapturedLoss
from packlight.capture.whole_step import Consumer, Consumption, WholeStep, whole_step
from packlight.costs.profiler import CallProfiler
from packlight.errors import UnsupportedModelError
from packlight.moves.additions import Additions
from packlight.moves.counted import Kept, copied_bytes, extras_bytes, primals_among
from packlight.moves.grouped import grouped_updates
from packlight.moves.reduction import Reduction, ReductionCosts
from packlight.moves.request import Request
from packlight.moves.sharding import Sharding, cut, shardable
from packlight.moves.stream.parameters import ParameterSlots, parameter_slots, without_results
from packlight.moves.stream.state import Slots, existing_slots, state_slots
from packlight.moves.stream.streamed import Streaming
from packlight.step import BufferKind, Lane, StepMemory, with_transfers
from packlight.updates.accounting import (
    OptimizerMemory,
    batch_bytes,
    measure_optimizer,
    refuse_closure,
    refuse_uneven_steps,
    tensors_bytes,
)
from packlight.updates.several import SeveralUpdates, parts_of, states_left, updates_of
from packlight.updates.twin import state_tensors
from packlight.updates.update import ParameterUpdates, UpdateCost

if TYPE_CHECKING:
    from packlight.moves.draft import Draft

SCALAR_BYTES = 64  # loss, its weight and their sums, outside of the schedule


class StepCosts:
    """Measures, once, what a user's optimizer and model cost outside of the captured graph.

    Attributes:
        device: of the model.
        updates: steps the optimizer one parameter at a time; None where there is no optimizer.
        trained: the parameters that it updates, by id.
        beside: what the loop keeps that the step has no use for.
        network, exchanges: lanes to ranks with other parts of the batch, of the weights.
        ask_together: has all ranks answer a question at once, where they have to.
        agreed_buckets: those that ranks with another size of batch reduce, where there are such.
        are_compared: whether parameters are known to have the same values on all ranks.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        model, optimizer = request.model, request.optimizer
        self.device = next(model.parameters()).device
        self.updates: ParameterUpdates | SeveralUpdates | None = None
        for part in parts_of(optimizer):
            refuse_closure(part)
            refuse_uneven_steps(part)
        if optimizer is not None:
            self.updates = updates_of(optimizer)
        self.name_of = {id(p): name for name, p in model.named_parameters()}
        groups = [{"params": model.parameters()}] if optimizer is None else optimizer.param_groups
        self.trained = {id(p): p for g in groups for p in g["params"] if p.requires_grad}
        # A criterion may have parameters of its own.
        self._others = [p for p in self.trained.values() if id(p) not in self.name_of]
        for number, parameter in enumerate(self._others):
            self.name_of[id(parameter)] = f"parameter {number} of the loss"
        self.reductions = ReductionCosts(self.trained.values(), self.name_of, self.device)
        own = {id(part) for part in parts_of(optimizer)}
        self.beside = Kept.of(o for o in request.beside if id(o) not in own)
        self.network: Lane | None = None
        self.exchanges: Lane | None = None
        self.ask_together: Callable[[Callable[[Any], Any]], Any] | None = None
        self.agreed_buckets: tuple[tuple[str, ...], ...] | None = None
        self.are_compared = False
        self._additions = Additions(self.device)
        self._consumers: dict[Any, Consumer] = {}
        self._shardings: dict[Any, Sharding] = {}
        self._slots: Slots | None = None
        self._parameter_slots: ParameterSlots | None = None

    @cached_property
    def optimizer_bytes(self) -> int:
        """The optimizer's state, whether it exists yet or not, that of frozen layers included."""
        left = states_left(self.request.optimizer, self.trained).values()
        left_bytes = tensors_bytes(tensor for state in left for tensor in state_tensors(state))
        if self.updates is None or self.updates.refusal is not None:
            return self._whole_update.state_bytes + left_bytes
        return sum(self.updates.cost(p).state_bytes for p in self.trained.values()) + left_bytes

    @property
    def update_workspace_bytes(self) -> int:
        """What the optimizer's own `step()` allocates for a moment."""
        return self._whole_update.workspace_bytes

    @cached_property
    def _whole_update(self) -> OptimizerMemory:
        measured = [measure_optimizer(part) for part in parts_of(self.request.optimizer)]
        return OptimizerMemory(
            sum(one.state_bytes for one in measured),
            max((one.workspace_bytes for one in measured), default=0),
        )

    def names(self, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
        """Return what parameters are called."""
        return tuple(self.name_of[id(p)] for p in parameters)

    @property
    def trained_in_order(self) -> list[nn.Parameter]:
        """The trained parameters in the model's order, that of a loop's `clip_grad_norm_`."""
        mine = [p for p in self.request.model.parameters() if id(p) in self.trained]
        return [*mine, *self._others]

    def changed_parameter(self, loss: CapturedLoss) -> str | None:
        """Return the name of a trained parameter that the forward changes in place, if any."""
        written = [id(loss.arguments[primal]) for primal in loss.written_back.values()]
        return next((self.name_of[key] for key in written if key in self.trained), None)

    def refuse_unread(self, loss: CapturedLoss) -> None:
        """Raise where the optimizer holds parameters that neither the model has nor the loss reads.

        Raises:
            UnsupportedModelError: it does.
        """
        read = {id(argument) for argument in loss.arguments}
        strange = [tuple(p.shape) for p in self._others if id(p) not in read]
        if strange:
            raise UnsupportedModelError(
                f"the optimizer holds {len(strange)} parameters that are not the model's and that "
                f"the loss does not read, the first of shape {strange[0]}\n"
                "hint: build the optimizer from model.parameters()"
            )

    @property
    def steps_one_by_one(self) -> bool:
        """Whether parameters may be updated one after the other."""
        return self.updates is not None and self.updates.refusal is None

    @property
    def steps_alone(self) -> bool:
        """... each before all gradients are there."""
        no_norm = self.request.clipping.norm is None and self.request.scaler is None
        return self.steps_one_by_one and no_norm

    def state_slots(self) -> Slots:
        """Return what of the optimizer's state can be streamed; that of frozen layers rests."""
        assert self.request.optimizer is not None
        if self._slots is None:
            left = states_left(self.request.optimizer, self.trained).items()
            named = {id(p) for p in self.request.model.parameters()}
            self._slots = {p: existing_slots(state) for p, state in left if id(p) in named}
            for part in parts_of(self.request.optimizer):
                held = {id(p) for group in part.param_groups for p in group["params"]}
                mine = [p for p in self.trained.values() if id(p) in held]
                self._slots.update(state_slots(part, mine))
        return self._slots

    def parameter_slots(self, loss: CapturedLoss, how: Consumption) -> ParameterSlots:
        """Return which parameters (and large buffers) of the model can be streamed.

        Args:
            loss: as captured.
            how: what happens to gradients. Where all parameters are updated together, only frozen
                ones are streamed.
        """
        if self._parameter_slots is None:
            self._parameter_slots = parameter_slots(self.request.model)
        slots = without_results(self._parameter_slots, loss)
        if how is Consumption.UPDATE or (how is Consumption.ACCUMULATE and self.steps_alone):
            return slots
        return {tensor: spec for tensor, spec in slots.items() if id(tensor) not in self.trained}

    def completed(self, joint: JointStep, draft: Draft, profiler: CallProfiler) -> WholeStep:
        """Return a captured step in which every gradient is consumed, at its measured costs.

        Args:
            joint: the draft's graph, as it was read.
            draft: says what happens to gradients, and what lies elsewhere.
            profiler: remembers seconds.
        """
        loss, how, streaming = draft.loss, draft.gradients, draft.streaming
        machine, reduction = draft.machine, draft.reduction
        consumers: dict[int, Consumer] = {}
        trained = self.parameters(loss.arguments)
        reductions = None
        if reduction is not None and (how is not Consumption.ACCUMULATE or reduction.sums_each):
            reductions = self.reductions.of(reduction, trained, profiler)
        sharding = Sharding() if reduction is None else reduction.sharding
        packed = set() if reductions is None else reductions.packed
        copies = copied_bytes(joint, trained, is_reduced=reductions is not None)
        for primal, parameter in trained.items():
            consumer = self._consumer(
                joint, primal, parameter, how, profiler, primal in packed,
                sharding.num_rows(parameter),
            )
            if streaming:  # only what is streamed has a buffer of its own
                streamed = streaming.states.get(parameter, {}).values()
                consumer = replace(consumer, state_bytes=sum(spec.num_bytes for spec in streamed))
            workspace = consumer.workspace_bytes + copies.get(primal, 0)
            consumers[primal] = replace(consumer, workspace_bytes=workspace)
        together = None
        if how is Consumption.TOGETHER:
            seconds = sum(consumer.seconds for consumer in consumers.values())
            seconds += 0.0 if reduction is None else reduction.share_seconds
            norms_bytes = SCALAR_BYTES * len(consumers) if self.request.clipping.norm else 0
            one_by_one = sharding and self._workspace_bytes(streaming, sharding)
            update_bytes = one_by_one or self.update_workspace_bytes
            workspace = max(update_bytes, norms_bytes) + sum(copies.values())
            together = Consumer("all parameters", seconds, workspace)
        groups: dict[tuple[int, ...], Consumer] = {}
        if draft.groups_updates and self.updates is not None:
            alone = {primal: p for primal, p in trained.items() if primal not in copies}
            groups = grouped_updates(joint, alone, self.updates, draft.group_bytes, profiler)
        step = whole_step(joint, consumers, how, together, groups)
        if reductions is not None:
            step = with_reductions(step, reductions)
        if machine is None:
            assert not streaming, "nothing can lie on the disk where there is none"
            return step
        moved = primals_among(loss, streaming.parameters)
        gathered = primals_among(loss, sharding.rests)
        buffers = {
            primal: joint.buffer_of_node[joint.primals[primal]] for primal in (*moved, *gathered)
        }
        on_disk = [buffers[primal] for primal in moved]
        resting = (*step.state_buffer_of.values(), *on_disk) if streaming else ()
        moved = {**moved, **gathered}
        # What was captured are values without gradients; reports tell parameters from states.
        named = list(step.joint.graph.buffers)
        for primal, b in buffers.items():
            name = self.name_of.get(id(moved[primal]), named[b].name)
            named[b] = replace(named[b], kind=BufferKind.PARAMETER, name=name)
        graph = replace(step.joint.graph, buffers=tuple(named))
        in_pieces = [buffers[primal] for primal in gathered]
        joint = replace(step.joint, graph=with_transfers(graph, machine, resting, in_pieces))
        return replace(step, joint=joint, parameter_buffer_of=buffers)

    def _consumer(
        self,
        joint: JointStep,
        primal: int,
        parameter: nn.Parameter,
        how: Consumption,
        profiler: CallProfiler,
        is_packed: bool,
        num_rows: int | None,
    ) -> Consumer:
        name = self.name_of[id(parameter)]
        node = joint.backward_results[primal]
        if node is None:
            return Consumer(name)
        if how is Consumption.ACCUMULATE:
            return Consumer(name, self._additions.seconds(parameter, profiler))
        if self.updates is None or self.updates.refusal is not None:
            return Consumer(name)
        # In a bucket it lies as the parameter does.
        key = (name, None if is_packed else tuple(node.meta["val"].stride()), num_rows)
        if key not in self._consumers:  # later on, its state may lie elsewhere
            cost = self.update(parameter, key[1], profiler, num_rows)
            workspace = cost.workspace_bytes
            self._consumers[key] = Consumer(name, cost.seconds, workspace, cost.state_bytes)
        return self._consumers[key]

    def update(
        self,
        parameter: nn.Parameter,
        stride: tuple[int, ...] | None,
        profiler: CallProfiler,
        num_rows: int | None = None,
    ) -> UpdateCost:
        """Return what an update costs, seconds as they were first seen on this device.

        Args:
            parameter: it.
            stride: of its gradients; None for its own.
            profiler: remembers seconds.
            num_rows: of a piece of it that is updated in its place.
        """
        assert self.updates is not None
        cost = self.updates.cost(parameter, stride, num_rows)
        shape = tuple(parameter.shape)
        if num_rows is not None:
            shape = (num_rows, *shape[1:])
        name = (
            f"update {self.updates.kind(parameter)} {shape} "
            f"{parameter.dtype} {stride or parameter.stride()} in {cost.num_slices}"
        )
        return replace(cost, seconds=profiler.remembered_seconds(name, self.device, cost.seconds))

    def moved_primals(
        self, loss: CapturedLoss, streaming: Streaming, reduction: Reduction | None
    ) -> dict[int, torch.Tensor]:
        """Return the streamed or gathered tensors among a captured call's inputs, by position."""
        rests = {} if reduction is None else reduction.sharding.rests
        return {**primals_among(loss, streaming.parameters), **primals_among(loss, rests)}

    def sharding(self, loss: CapturedLoss, num_ranks: int) -> Sharding:
        """Return which parameters can lie in pieces with so many ranks, and who has which rows."""
        parameters = shardable(self.request.model, loss, self.trained)
        key = (*map(id, parameters), num_ranks)
        if key not in self._shardings:
            self._shardings[key] = cut(parameters, self.updates, num_ranks)
        return self._shardings[key]

    def _workspace_bytes(self, streaming: Streaming, sharding: Sharding) -> int:
        """Return what updates take that run one after the other."""
        assert (updates := self.updates) is not None
        return max(
            updates.cost(p, None, sharding.num_rows(p)).workspace_bytes
            + sum(spec.num_bytes for spec in streaming.of_update(p)) for p in self.trained.values()
        )

    def _optimizer_bytes(self, sharding: Sharding) -> int:
        """Return the optimizer's state where that of some parameters lies in pieces."""
        if not sharding:
            return self.optimizer_bytes
        assert self.updates is not None, "what is in pieces is updated one by one"
        whole = (self.updates.cost(p) for p in self.trained.values() if p not in sharding)
        return sharding.state_bytes + sum(cost.state_bytes for cost in whole)

    def parameters(self, arguments: Sequence[Any]) -> dict[int, nn.Parameter]:
        """Return the trained parameters among a captured call's inputs, by position."""
        return {i: self.trained[id(a)] for i, a in enumerate(arguments) if id(a) in self.trained}

    def memory(
        self,
        batch: Any,
        loss: CapturedLoss,
        num_microbatches: int,
        streaming: Streaming | None = None,
        sharding: Sharding | None = None,
        sums_each: bool = True,
    ) -> StepMemory:
        """Return the bytes of a step outside of its schedule.

        Args:
            batch: the whole one.
            loss: as captured.
            num_microbatches: with more than one, gradients are accumulated in the step.
            streaming: what lies on the disk between uses.
            sharding: what lies in pieces with all ranks.
            sums_each: of gradients in pieces each rank accumulates its own (see `Reduction`).
        """
        model, streaming = self.request.model, streaming or Streaming()
        sharding = sharding or Sharding()
        trained = self.parameters(loss.arguments)
        results = next(n for n in reversed(loss.joint.graph.nodes) if n.op == "output").args[0]
        gradients = results[loss.num_forward_outputs :]
        with_gradients = [p for i, p in trained.items() if gradients[i] is not None]
        if self.request.accumulates:  # other steps may add to the others
            with_gradients = [*self.trained.values()]
        gradient_bytes = sum(p.nbytes for p in with_gradients)
        accumulated_bytes = workspace_bytes = 0
        kept_extras_bytes = extras_bytes(loss, batch, num_microbatches)
        if num_microbatches > 1:
            written = [loss.arguments[primal] for primal in loss.written_back.values()]
            accumulated_bytes = tensors_bytes(written) + kept_extras_bytes
        if num_microbatches > 1 or self.request.accumulates:
            accumulated_bytes += sharding.own_bytes(with_gradients) if sums_each else gradient_bytes
            if self.steps_alone or sharding:
                workspace_bytes = self._workspace_bytes(streaming, sharding)
            else:
                workspace_bytes = self.update_workspace_bytes
        # What the loss reads beside: the model's buffers, a teacher's weights, classes' weights.
        outside = [*model.parameters(), *tensors_of(batch)]
        arguments = [a for a in loss.arguments if isinstance(a, torch.Tensor)]
        others = [t for t in (*model.buffers(), *arguments) if t not in streaming.parameters]
        return StepMemory(
            parameter_bytes=tensors_bytes(
                p for p in model.parameters()
                if p not in streaming.parameters and p not in sharding.gathered
            ) + sharding.parameter_bytes,
            # What attributes (and whoever called the step) hold since the step before is let go of
            # when it is assigned anew.
            state_bytes=tensors_bytes([*outside, *others]) - tensors_bytes(outside)
            + sum(value.untyped_storage().nbytes() for value in loss.assigned)
            + kept_extras_bytes,
            input_bytes=batch_bytes(batch) + SCALAR_BYTES,
            optimizer_bytes=self._optimizer_bytes(sharding) - streaming.state_bytes,
            update_workspace_bytes=workspace_bytes,
            gradient_bytes=gradient_bytes,
            accumulated_bytes=accumulated_bytes,
            beside_bytes=self.beside.bytes_beside([*outside, *model.buffers(), *arguments]),
        )
