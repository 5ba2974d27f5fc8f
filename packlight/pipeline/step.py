"""A training step in stages: each rank works through its instructions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.capture.step_capture import CapturedAgainError, StepCapture
from packlight.cluster.instructions import PipelineSchedule
from packlight.errors import BatchError, NonFiniteLossError, UnsupportedModelError
from packlight.lower.program import Program
from packlight.lower.rng import generator_state, set_generator_state
from packlight.moves.microbatch.split import LossWeight, loss_weights, num_rows, split
from packlight.pipeline.channel import Channel
from packlight.pipeline.memory import messages, received_before
from packlight.pipeline.shared import SharedParameters
from packlight.pipeline.split import Value
from packlight.pipeline.stage import PlannedStage
from packlight.pipeline.under_way import UnderWay
from packlight.ranks.group import Ranks
from packlight.units import format_bytes
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
        ranks: of the pipeline.
        schedule: what each does, in which order.
        stages: those of this rank, planned.
        parameters: primal -> the parameter that it is.
        draws: whether the step draws random numbers.
    """

    ranks: Ranks
    schedule: PipelineSchedule
    stages: Mapping[int, PlannedStage]
    parameters: Mapping[int, nn.Parameter]
    draws: bool

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
    """

    def __init__(
        self,
        layout: Layout,
        capture: StepCapture,
        optimizer: torch.optim.Optimizer,
        updates: ParameterUpdates | SeveralUpdates | None,
        loss_weight: LossWeight,
        shared: SharedParameters,
        example_rows: int,
        budget_bytes: int | None,
        peak_bytes: int,
    ) -> None:
        self.layout, self.optimizer = layout, optimizer
        self.budget_bytes, self.peak_bytes = budget_bytes, peak_bytes
        self._capture, self._updates, self._loss_weight = capture, updates, loss_weight
        self._rows = example_rows
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
        self._program = self._take  # one object: it is known by its identity
        capture.install(self._program)

    # -- a step

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train on a batch, which is the same on all ranks; return its loss, on all of them.

        Microbatch i draws the random numbers that follow `torch.manual_seed(seed + i)`, where the
        seed is drawn by the first rank's generator: so masks do not depend on how many ranks there
        are, nor on the schedule.

        Raises:
            BatchError: it has another number of rows.
            MicrobatchError: nothing in it counts; nothing has run.
            UnsupportedModelError: parameters hold gradients already, and nothing has run; or what
                was traced is another step now, and no parameter was updated.
            NonFiniteLossError: no parameter was updated.
            RankError: another rank failed, or is gone.
        """
        parts = self._parts(batch)
        weights = loss_weights(self._loss_weight, parts)
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
        run = UnderWay(self, parts, weights, self._seed())
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
        self._update()
        return loss

    def _update(self) -> None:
        if self._updates is not None:
            self._updates.begin_step()
        try:
            update_all(self.optimizer, self._trained, Clipping(), None, self._updates)
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
        own = int(torch.randint(MOST_SEED, ())) if self.layout.ranks.rank == 0 else 0
        return self.layout.ranks.exchange(own)[0]

    def _agreed(self, losses: Mapping[int, torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Return the weighted sum of losses, on all ranks."""
        total = torch.zeros((), device=self.device)
        for microbatch in sorted(losses):
            total = total + weights[microbatch] * losses[microbatch]
        last = self.layout.schedule.rank_of_stage[-1]
        (number,) = self.layout.ranks.exchange_numbers([float(total)])[last]
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

    def describe(self) -> str:
        """Return what this rank does and holds, in words."""
        layout = self.layout
        lines = [
            f"{layout.schedule.name} on {layout.ranks.size} ranks, "
            f"{layout.schedule.num_microbatches} microbatches; rank {layout.ranks.rank} holds at "
            f"most {format_bytes(self.peak_bytes)}"
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
