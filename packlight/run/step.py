"""Runs a prepared training step: microbatches, write-backs, and what is left of the update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from packlight.capture.returned import loss_of, with_loss
from packlight.capture.step_capture import CapturedAgainError
from packlight.capture.whole_step import Consumption
from packlight.errors import NonFiniteLossError, RankError, UnsupportedModelError
from packlight.memory.far import far_memory
from packlight.memory.tier import SlotSpec, Tier
from packlight.moves.microbatch.extras import Gathered
from packlight.moves.microbatch.split import loss_weights, num_rows, split
from packlight.moves.precision import refuse_collapsed_scale
from packlight.moves.request import Request
from packlight.moves.step_costs import StepCosts
from packlight.moves.stream.streamed import Key, Resting, StreamedBuffers, StreamedTensors
from packlight.ranks.reducer import OtherModelError, Reducer
from packlight.ranks.sharded import ShardedParameters, key_of
from packlight.ranks.tensor import parts_of
from packlight.ranks.together import Together
from packlight.run.planned_loss import PlannedLoss
from packlight.run.ranks import Accumulated, RankWeights
from packlight.search.ready import Ready, ReadyPart
from packlight.search.words import describe, how_it_runs
from packlight.step import Plan, StepMemory
from packlight.updates.cut import cut_states
from packlight.updates.gradients import (
    GradientFate,
    drop_gradients,
    refuse_held_gradients,
    update_all,
)


class StepRunner:
    """A way to run the step, ready to be called with batches of one signature.

    Attributes:
        ready: how the step runs.
    """

    def __init__(
        self,
        costs: StepCosts,
        streamed: StreamedTensors,
        sharded: ShardedParameters | None,
        ready: Ready,
    ) -> None:
        self.ready, self._costs, self._streamed = ready, costs, streamed
        self._sharded = sharded
        request = self._request = costs.request
        self._trained = costs.trained_in_order
        self._on_disk = ready.streaming.places(request.optimizer)
        in_backward = ready.gradients is Consumption.UPDATE
        accumulates = ready.gradients is Consumption.ACCUMULATE
        alone = accumulates and costs.steps_alone
        is_one_by_one = in_backward or alone or bool(ready.in_pieces)
        self._updates = costs.updates if is_one_by_one else None
        sums_each = ready.reduction is not None and ready.reduction.sums_each
        self._reducer: Reducer | None = None
        self._accumulated: Accumulated | None = None
        if request.data_ranks is not None:
            self._reducer = Reducer(
                request.data_ranks, request.shard_ranks, request.replica_ranks
            )
            self._weights = RankWeights(request.data_ranks, ready)
            if accumulates and not sums_each:
                self._accumulated = Accumulated(self._buckets(), self._reducer, sharded)
        self._together = _together(request, ready)
        self._loss_weight = 1.0
        self._programs: dict[int | None, PlannedLoss] = {}
        for part in ready.parts:
            fate = GradientFate(
                part.parameter_of,
                part.traced.loss.loss_index,
                request.clipping,
                self._updates if in_backward else None,
                reducer=self._reducer,
                sharded=sharded,
                place_of=None if self._accumulated is None else self._accumulated.place_of,
                accumulates=accumulates and sums_each,
            )
            buffers = StreamedBuffers(self._held(part))
            talks = bool(ready.sharding.gathered) or (accumulates and sums_each)
            program = PlannedLoss(part, fate, buffers, self._make_tier, talks)
            self._programs[part.traced.num_rows] = program
            part.traced.capture.install(program)

    def _held(self, part: ReadyPart) -> dict[int, tuple[Resting, Key]]:
        """Return who has what the buffers of a part's graph stand for that rest elsewhere."""
        held: dict[int, tuple[Resting, Key]] = {
            buffer: (self._streamed, ("state", id(part.parameter_of[primal])))
            for primal, buffer in part.step.state_buffer_of.items()
        }
        gathered = self.ready.sharding.gathered
        for primal, buffer in part.step.parameter_buffer_of.items():
            tensor = part.streamed_of[primal]
            if tensor in gathered:
                if self._sharded is not None:  # else all ranks are modelled
                    held[buffer] = self._sharded, key_of(tensor)
            else:
                held[buffer] = self._streamed, ("parameter", id(tensor))
        return held

    def runs(self, program: Any) -> bool:
        """Whether a program is one of this way's."""
        return any(program is mine for mine in self._programs.values())

    def forget(self) -> None:
        """Let go of the programs: the traced calls that they stand for are to be planned anew."""
        for part in self.ready.parts:
            part.traced.capture.remove(self._programs[part.traced.num_rows])

    @property
    def memory(self) -> StepMemory:
        """Bytes of the step outside of its schedule."""
        return self.ready.way.memory

    @property
    def plan(self) -> Plan:
        """The schedule that runs (per microbatch, the largest)."""
        return self.ready.way.parts[0].plan

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step, everything resident included."""
        return self.ready.way.peak_bytes

    def _make_tier(self, slots: Sequence[SlotSpec]) -> Tier:
        far = far_memory(self._costs.device, self._request.offload_directory)
        assert far is not None, "transfers are planned only where there is a tier"
        return far.make_tier(slots)

    def arrange(self) -> None:
        """Have on the disk what this way streams, in pieces what it gathers, all else in memory.

        Where parameters lie in pieces, all ranks do this at once.

        Raises:
            OffloadError: the disk is full or broken; no value is lost.
        """
        self._streamed.arrange(self._on_disk)
        if self._sharded is not None:
            cut = partial(cut_states, self._request.optimizer)
            self._sharded.arrange(self.ready.in_pieces, self.ready.sharding.gathered, cut)

    def run(self, batch: Any, num_steps: int) -> Any:
        """Train one step and return what the loss function does, detached.

        Raises:
            NonFiniteLossError: nothing is changed.
            LossScaleError: no parameter is changed, nor is optimizer state.
            CapturedAgainError: the model changed since it was captured; nothing is changed.
            UnsupportedModelError: parameters hold gradients already; nothing is changed.
            RankError: another rank failed, or is gone.
        """
        if self._reducer is None:
            return self._run_alike(batch, num_steps)
        self._reducer.begin(self._weights.of_this_rank(batch), num_steps)
        try:
            return self._run(batch, num_steps)
        except OtherModelError:  # this rank's is as it was
            raise CapturedAgainError(next(iter(self._programs.values()))) from None
        except BaseException as error:
            self._reducer.leave(error, isinstance(error, CapturedAgainError))
            self._fail_unless_everybodys(error)
            raise

    def _run_alike(self, batch: Any, num_steps: int) -> Any:
        """Run without ranks, or with those that have the same batch and so the same loss."""
        try:
            return self._run(batch, num_steps)
        except BaseException as error:
            self._fail_unless_everybodys(error)
            raise

    def _fail_unless_everybodys(self, error: BaseException) -> None:
        """End ranks with other parts of the weights, which may wait in the middle of a forward."""
        if isinstance(error, (NonFiniteLossError, CapturedAgainError, RankError)):
            return
        if self._request.tensor_ranks is not None:
            self._request.tensor_ranks.fail(error)

    def _run(self, batch: Any, num_steps: int) -> Any:
        optimizer = self._request.optimizer
        assert optimizer is not None
        refuse_held_gradients(self._trained, self._costs.name_of)
        if self._updates is not None:
            self._updates.begin_step()
        optimizer.zero_grad(set_to_none=True)
        self.arrange()
        if self._sharded is not None:
            self._sharded.begin_step()
        try:
            returned = self._run_batch(batch, num_steps)
            self._update(num_steps)
        except BaseException:
            self._reset()
            raise
        finally:
            optimizer.zero_grad(set_to_none=True)
            if self._sharded is not None:
                self._sharded.end_step()
            if self._accumulated is not None:
                self._accumulated.clear()
        return returned

    def _in_memory(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Have what this rank updates of a parameter in memory."""
        if self._sharded is not None and parameter in self._sharded:
            return self._sharded.own(parameter)
        return self._streamed.in_memory(parameter)

    def backward(self, batch: Any, num_steps: int, weight: float = 1.0) -> Any:
        """Add a weighted loss's gradients to those there are; return what the loss function does.

        Raises:
            CapturedAgainError: the model changed since it was captured; nothing is changed.
            Exception: as `run`; gradients that were there are dropped.
        """
        self.arrange()
        self._loss_weight = weight
        try:
            return self._run_batch(batch, num_steps)
        except CapturedAgainError:
            raise
        except BaseException:
            self._reset()
            drop_gradients(self._trained)
            raise
        finally:
            self._loss_weight = 1.0

    def update(self, num_steps: int) -> None:
        """Update the parameters from the gradients that are there, and drop those."""
        self.arrange()
        if self._updates is not None:
            self._updates.begin_step()
        try:
            self._update(num_steps)
        except BaseException:
            self._reset()
            raise
        finally:
            drop_gradients(self._trained)

    def _run_batch(self, batch: Any, num_steps: int) -> Any:
        if self.ready.way.num_microbatches == 1:
            return self._run_whole(batch, num_steps)
        return self._run_microbatches(batch, num_steps)

    def _update(self, num_steps: int) -> None:
        request, optimizer = self._request, self._request.optimizer
        assert optimizer is not None
        if self.ready.gradients is not Consumption.UPDATE:
            trained, scaler = self._trained, request.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            update_all(
                optimizer, trained, request.clipping, scaler, self._updates, self._in_memory,
                self._together,
            )
            if scaler is not None:
                names = self._costs.name_of
                gradients = ((names[id(p)], p.grad) for p in trained)
                refuse_collapsed_scale(scaler, scale, gradients, num_steps)
            if self._sharded is not None:
                self._sharded.share_all()
        if self._sharded is not None:
            self._sharded.wait_shared()
        if self._updates is not None:
            self._updates.end_step()

    def _reset(self) -> None:
        """Forget what is under way, after a failed step."""
        for program in self._programs.values():
            program.reset()
        self._streamed.reset()

    def _run_whole(self, batch: Any, num_steps: int) -> Any:
        (program,) = self._programs.values()
        program.set_up(self._weight, num_steps, None)
        returned = self.ready.parts[0].traced.capture(batch, program)
        if self._reducer is None:
            return returned
        return with_loss(returned, torch.full_like(loss_of(returned), self._reducer.total_loss()))

    def _run_microbatches(self, batch: Any, num_steps: int) -> Any:
        """Run microbatch after microbatch; model buffers are put back if one of them fails."""
        microbatches = split(batch, self.ready.way.num_microbatches)
        assert self.ready.loss_weight is not None
        weights = [0.0] * len(microbatches)
        if self._rank_weight:
            weights = loss_weights(self.ready.loss_weight, microbatches)
        traced_of = {p.traced.num_rows: p.traced for p in self.ready.parts}
        has_extras = any(part.traced.loss.extras for part in self.ready.parts)
        gathered = Gathered(num_rows(batch), has_extras)
        total: torch.Tensor | None = None
        backup: dict[torch.Tensor, torch.Tensor] = {}
        index = 0
        try:
            for index, (microbatch, weight) in enumerate(zip(microbatches, weights, strict=True)):
                rows = num_rows(microbatch)
                program = self._programs[rows]
                if weight == 0:  # its loss may be 0/0, and it counts for nothing
                    gathered.leave_out(index)
                    if self._reducer is not None and program.talks:  # the others count on it
                        self._reducer.counts = False
                        program.set_up(0.0, num_steps, index, backup)
                        traced_of[rows].capture(microbatch, program)
                        self._reducer.counts = True
                    continue
                program.set_up(weight * self._weight, num_steps, index, backup)
                loss = gathered.add(traced_of[rows].capture(microbatch, program), rows).mul_(weight)
                total = loss if total is None else total.add_(loss)
            if self._reducer is not None:
                total = self._added_up(total)
        except BaseException as error:
            for tensor, value in backup.items():
                tensor.copy_(value)
            if isinstance(error, CapturedAgainError) and index > 0:
                raise UnsupportedModelError(
                    "a microbatch changed what the next one's trace depends on: the forward or the "
                    "loss counts in a plain number, or collects in a list\n"
                    "hint: count in a registered buffer, or leave 'microbatch' out of moves="
                ) from None
            raise
        assert total is not None, "loss_weights refuses microbatches of which none counts"
        return gathered.result(total)

    def _added_up(self, loss: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of all ranks, and have accumulated gradients be those of all."""
        assert self._reducer is not None
        self._reducer.give_loss(0.0 if loss is None else float(loss))
        total = self._reducer.total_loss()
        if self._accumulated is not None:
            self._accumulated.reduce()
        like = self._trained[0] if loss is None else loss
        return torch.full((), total, dtype=like.dtype, device=like.device)

    def _buckets(self) -> list[list[nn.Parameter]]:
        """Return the parameters whose gradients are reduced together."""
        assert self.ready.reduction is not None, "gradients of ranks are always reduced"
        parameter_of = {self._costs.name_of[id(p)]: p for p in self._trained}
        return [[parameter_of[name] for name in b] for b in self.ready.reduction.buckets]

    @property
    def _rank_weight(self) -> float:
        """How much this rank's part of the batch counts."""
        return 1.0 if self._reducer is None else self._reducer.weight

    @property
    def _weight(self) -> float:
        """How much this batch's loss counts, scaled."""
        return self._loss_weight * self._rank_weight * self._scale

    @property
    def _scale(self) -> float:
        """What the loss is multiplied with; the first call sets a scaler up, as a loop's does."""
        scaler = self._request.scaler
        one = torch.ones((), device=self._trained[0].device)
        return 1.0 if scaler is None else float(scaler.scale(one))

    def how_it_runs(self) -> list[tuple[str, str]]:
        """Return (name, text): the precision, the moves made, and why others were not."""
        return how_it_runs(self.ready.way, self._request)

    def describe(self) -> str:
        """Return a few lines: what is in memory at the peak, the moves made, and the price."""
        return describe(self.ready, self._request)


def _together(request: Request, ready: Ready) -> Together | None:
    """Return what looks at the gradients of all ranks; None where each rank has all of them."""
    if request.ranks is None or not (ready.in_pieces or request.is_tensor_parallel):
        return None
    parts = parts_of(request.model)
    has_data = request.data_ranks is None or request.data_ranks.rank == 0
    has_pieces = request.replica_ranks is None or request.replica_ranks.rank == 0
    has_weights = request.tensor_ranks is None or request.tensor_ranks.rank == 0
    pieces = ready.in_pieces

    def counts(parameter: nn.Parameter) -> bool:
        has_it = has_pieces if parameter in pieces else has_data
        return has_it and (has_weights or parameter in parts)

    return Together(request.ranks, counts)
