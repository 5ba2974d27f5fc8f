"""A training step in stages: each rank works through its instructions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from packlight.capture.step_capture import CapturedAgainError, StepCapture
from packlight.cluster.instructions import PipelineSchedule
from packlight.errors import BatchError, NonFiniteLossError, UnsupportedModelError
from packlight.lower.program import Program
from packlight.lower.rng import generator_state, set_generator_state
from packlight.moves.microbatch.split import LossWeight, num_rows, split
from packlight.moves.precision import refuse_collapsed_scale
from packlight.pipeline.channel import Channel
from packlight.pipeline.memory import messages, received_before
from packlight.pipeline.predicted import timeline_of
from packlight.pipeline.replicas import MicrobatchWeights, add_up_over
from packlight.pipeline.shared import SharedParameters
from packlight.pipeline.split import Value
from packlight.pipeline.stage import PlannedStage
from packlight.pipeline.under_way import UnderWay
from packlight.ranks.group import Ranks
from packlight.ranks.parallel import RankGroups
from packlight.ranks.sharded import Lying
from packlight.ranks.together import Together
from packlight.run.distributed import load_distributed, save_distributed
from packlight.units import format_bytes, format_seconds
from packlight.updates.gradients import (
    Clipping,
    drop_gradients,
    refuse_held_gradients,
    update_all,
)
from packlight.updates.several import SeveralUpdates
from packlight.updates.update import ParameterUpdates

MOST_SEED = 2**62


@dataclass(frozen=True)
class Layout:
    """Who does what.

    Attributes:
        groups: all ranks; those that have the same stages (data); those of one pipeline (tensor).
        schedule: what each does, in which order.
        stages: those of this rank, planned.
        parameters: primal -> the parameter that it is.
        draws: whether the step draws random numbers.
    """

    groups: RankGroups
    schedule: PipelineSchedule
    stages: Mapping[int, PlannedStage]
    parameters: Mapping[int, nn.Parameter]
    draws: bool

    @property
    def ranks(self) -> Ranks:
        """Those of this pipeline."""
        return self.groups.tensor or self.groups.all

    @property
    def data(self) -> Ranks | None:
        """Those with the same stages and other parts of the batch, where there are some."""
        return self.groups.data if self.groups.tensor is not None else None

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """Those that this rank's stages read, in the order of the step's primals."""
        taken = {p for stage in self.stages.values() for p in stage.graph.primals}
        return [parameter for p, parameter in self.parameters.items() if p in taken]


class PipelineStep:
    """What `packlight.fit_pipeline` returns: call it with the whole batch, on all ranks.

    Attributes:
        budget_bytes: of each rank, None for no limit.
        peak_bytes: what this rank holds at most, everything counted.
        timeline: when what happens on each rank of this pipeline, by the measured seconds of calls
            and messages.
        predicted_seconds: of a step: the timeline, and the slowest rank's update.
    """

    def __init__(
        self,
        layout: Layout,
        capture: StepCapture,
        optimizer: torch.optim.Optimizer,
        updates: ParameterUpdates | SeveralUpdates | None,
        loss_weight: LossWeight,
        shared: SharedParameters,
        example: Any,
        budget_bytes: int | None,
        peak_bytes: int,
        clipping: Clipping,
        scaler: torch.amp.GradScaler | None,
        update_seconds: float,
    ) -> None:
        self.layout, self.optimizer = layout, optimizer
        self.budget_bytes, self.peak_bytes = budget_bytes, peak_bytes
        self._capture, self._updates = capture, updates
        self._rows = num_rows(example)
        self.clipping, self.scaler = clipping, scaler
        schedule = layout.schedule
        self.device = next(iter(layout.stages.values())).step.device
        self.channel = Channel(layout.ranks, schedule, self.device)
        self.sent = messages(schedule)
        self._received = received_before(schedule)[layout.ranks.rank]
        self.programs: dict[int, Program] = {k: s.program() for k, s in layout.stages.items()}
        self._shared = shared
        self._trained = [p for p in layout.own_parameters if p.requires_grad]
        self._name_of = {id(p): name for name, p in capture.model.named_parameters()}
        state = generator_state(self.device)
        self.state_value = Value("generator", tuple(state.shape), (1,), state.dtype, state.nbytes)
        self._num_steps = 0
        self._together = Together(layout.groups.all, self._counts)
        self._weights = MicrobatchWeights(loss_weight, layout.data)
        self.timeline = timeline_of(layout, self.channel.measured())
        updating = layout.ranks.exchange_numbers([update_seconds])
        self.predicted_seconds = self.timeline.total_seconds + max(s for (s,) in updating)
        self._program = self._take  # one object: it is known by its identity
        capture.install(self._program)

    # -- a step

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train on a batch, which is the same on all ranks of a pipeline; return its loss, on all.

        Microbatch i draws the random numbers that follow `torch.manual_seed(seed + i)`, where the
        seed is drawn by the first rank's generator: so masks do not depend on how many ranks there
        are, nor on the schedule. Of several pipelines, microbatches are counted from one to the
        next.

        Raises:
            BatchError: it has another number of rows.
            MicrobatchError: nothing in it counts; nothing has run.
            UnsupportedModelError: parameters hold gradients already, and nothing has run; or what
                was traced is another step now, and no parameter was updated.
            NonFiniteLossError: no parameter was updated.
            RankError: another rank failed, or is gone.
        """
        parts = self._parts(batch)
        weights = self._weights.of(parts)
        refuse_held_gradients(self._trained, self._name_of)
        try:
            loss = self._run(parts, weights)
        except NonFiniteLossError:
            raise
        except BaseException as error:
            self.channel.close(error)
            raise
        self._num_steps += 1
        return loss

    def _run(self, parts: Sequence[Any], weights: Sequence[float]) -> torch.Tensor:
        schedule, rank = self.layout.schedule, self.layout.ranks.rank
        run = UnderWay(self, parts, [weight * self._scale for weight in weights], self._seed())
        with _generator_kept(self.device), torch.no_grad(), self._shared.in_step():
            for position, instruction in enumerate(schedule.ranks[rank]):
                for source in self._received[position]:
                    self.channel.let_go(source)
                if weights[instruction.microbatch] == 0:  # nothing in it counts
                    continue
                run.do(instruction)
            self.channel.let_go_of_all()
        loss = self._agreed(run.losses, weights)
        if not math.isfinite(loss.item()):
            drop_gradients(self._trained)
            raise NonFiniteLossError(self._num_steps, loss.item())
        self._shared.add_up()
        if self.layout.data is not None:
            add_up_over(self.layout.data, self._with_gradients)
        self._update()
        return loss

    @property
    def _scale(self) -> float:
        """What the loss is multiplied with; the first call sets a scaler up, as a loop's does."""
        one = torch.ones((), device=self.device)
        return 1.0 if self.scaler is None else float(self.scaler.scale(one))

    @property
    def _with_gradients(self) -> list[nn.Parameter]:
        """The parameters of which this rank's stages make gradients, in one order everywhere."""
        primals = {p for stage in self.layout.stages.values() for p in stage.graph.gradients}
        return [self.layout.parameters[p] for p in sorted(primals)]

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank's gradient counts, of those that several ranks have alike."""
        is_first = self.layout.data is None or self.layout.data.rank == 0
        return is_first and self._shared.is_first_owner(parameter)

    def _update(self) -> None:
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        if self._updates is not None:
            self._updates.begin_step()
        try:
            update_all(
                self.optimizer, self._trained, self.clipping, self.scaler, self._updates,
                together=self._together,
            )
            if self.scaler is not None:
                named = ((self._name_of[id(p)], p.grad) for p in self._trained)
                refuse_collapsed_scale(self.scaler, scale, named, self._num_steps)
            if self._updates is not None:
                self._updates.end_step()
        finally:
            drop_gradients(self._trained)

    def _parts(self, batch: Any) -> list[Any]:
        rows = num_rows(batch)
        if rows != self._rows:
            raise BatchError(
                "batch", None, f"has {rows} rows, the step was planned for {self._rows}",
                "leave the last, smaller batch out, or fit a step for it",
            )
        return split(batch, self.layout.schedule.num_microbatches)

    def _seed(self) -> int:
        """Return the step's seed, which the first rank draws where the model draws at all."""
        if not self.layout.draws:
            return 0
        everybody, data = self.layout.groups.all, self.layout.data
        own = int(torch.randint(MOST_SEED, ())) if everybody.rank == 0 else 0
        before = 0 if data is None else data.rank * self.layout.schedule.num_microbatches
        return everybody.exchange(own)[0] + before

    def _agreed(self, losses: Mapping[int, torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Return the weighted sum of losses, on all ranks."""
        total = torch.zeros((), device=self.device)
        for microbatch in sorted(losses):
            total = total + weights[microbatch] * losses[microbatch]
        told = self.layout.groups.all.exchange_numbers([float(total)])
        number = sum(part for (part,) in told)
        return torch.tensor(number, dtype=total.dtype, device=self.device)

    # -- what dynamo passes

    def primals(self, part: Any) -> list[Any]:
        """Return the step's primals for a microbatch."""
        self._taken: list[Any] = []
        try:
            self._capture(part, self._program)
        except CapturedAgainError:
            raise UnsupportedModelError(
                "the traced step is another one than was planned: something that it depends on "
                "has changed (a mode, a plain value in the batch, an attribute of the model)\n"
                "hint: fit_pipeline again"
            ) from None
        return self._taken

    def _take(self, primals: list[Any]) -> list[Any]:
        self._taken = [*primals]
        return [torch.zeros((), device=self.device)]

    def seeded(self, seed: int) -> torch.Tensor:
        """Return the state of a generator with a seed."""
        torch.manual_seed(seed)
        return generator_state(self.device)

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Have all parameters in memory, on all ranks, for as long as the context lasts.

        Outside of it a rank has the values of its own stages' parameters alone; others have no
        rows.
        """
        return self._shared.whole()

    def save(self, directory: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint by torch.distributed.checkpoint, of all ranks together.

        Names are those of `TrainStep.save`: it can be loaded by other schedules, on other numbers
        of ranks, by `fit` and by one process. It appears whole or not at all.

        Args:
            directory: of this checkpoint; one that is there is replaced.
            extra: anything that JSON can hold, returned by `load`.
        """
        save_distributed(
            Path(directory), self._capture.model, self.optimizer, self.layout.groups.all, Lying(),
            extra, self._writes,
        )

    def load(self, directory: str | os.PathLike[str]) -> Any:
        """Go on from a checkpoint, all ranks together; return its `extra`.

        Raises:
            FormatError: there is no such checkpoint, or it is of another model.
        """
        return load_distributed(
            Path(directory), self._capture.model, self.optimizer, self.layout.groups.all, Lying(),
            lambda tensor: not self._shared.is_foreign(tensor),
        )

    def _writes(self, tensor: torch.Tensor) -> bool:
        """Whether this rank writes a parameter or buffer into checkpoints."""
        if isinstance(tensor, nn.Parameter) and self._shared.is_known(tensor):
            return self._counts(tensor)
        return self.layout.groups.all.rank == 0

    def describe(self) -> str:
        """Return what this rank does and holds, in words."""
        layout = self.layout
        lines = [
            f"{layout.schedule.name} on {layout.ranks.size} ranks, "
            f"{layout.schedule.num_microbatches} microbatches; rank {layout.ranks.rank} holds at "
            f"most {format_bytes(self.peak_bytes)}",
            f"  a step takes {format_seconds(self.predicted_seconds)}, "
            f"{self.timeline.bubble:.0%} of it waiting, by what calls and messages take alone",
        ]
        for index, stage in layout.stages.items():
            costs = stage.bytes
            lines.append(
                f"  stage {index} of {layout.schedule.num_stages}: "
                f"{len(stage.step.graph.operations)} operations, "
                f"{stage.num_reruns} run again; a microbatch keeps "
                f"{format_bytes(costs.kept[0])}, sends {format_bytes(costs.leaving)} on and "
                f"{format_bytes(costs.handing)} back"
            )
        return "\n".join(lines)


@contextmanager
def _generator_kept(device: torch.device) -> Iterator[None]:
    state = generator_state(device)
    try:
        yield
    finally:
        set_generator_state(state, device)
