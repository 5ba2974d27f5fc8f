"""Ways to run a training step: what was asked for, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from packlight.capture.step_capture import CapturedLoss, LossFunction, StepCapture
from packlight.capture.whole_step import Consumption, WholeStep
from packlight.moves.microbatch.split import LossWeight
from packlight.moves.precision import PRECISIONS, chosen_precision
from packlight.moves.stream.streamed import Streaming
from packlight.step import Action, Device, Plan, StepMemory
from packlight.updates.gradients import Clipping

MOVES = ("update-in-backward", "microbatch", "pack", "chunk", "offload")
# Those that change no bit of losses, gradients and parameters.
EXACT_MOVES = ("update-in-backward", "pack", "offload")
MICROBATCH_BATCH_NORM = "microbatch-batch-norm"
TECHNIQUES = (MICROBATCH_BATCH_NORM, *PRECISIONS)
# How much faster a step that rounds its sums in another order must be. Times of one way and another
# are a few percent apart by chance, and what lies between calls is in none of them.
ROUNDING_MARGIN = 1.05


@dataclass(frozen=True)
class Request:
    """What `fit` was asked for.

    Attributes:
        model, optimizer: the user's; no optimizer where nothing is to be trained.
        loss_fn: the user's, under autocast if a precision is allowed.
        budget_bytes: for the whole step, None for no limit.
        moves: names out of `MOVES` that may be used.
        allow: names out of `TECHNIQUES`.
        clipping: of gradients.
        scaler: scales the loss: the user's, or made for fp16.
        loss_weight: what the user says a microbatch's loss is divided by, if anything.
        offload_directory: where buffers may be offloaded to.
        progress: show what profiling does.
    """

    model: nn.Module
    loss_fn: LossFunction
    optimizer: torch.optim.Optimizer | None
    budget_bytes: int | None
    moves: frozenset[str]
    allow: frozenset[str]
    clipping: Clipping
    scaler: torch.amp.GradScaler | None
    loss_weight: LossWeight | None
    offload_directory: Path | None
    progress: bool

    @property
    def precision(self) -> str | None:
        """What the loss runs in under autocast, one of `PRECISIONS`."""
        return chosen_precision(self.allow)


@dataclass(frozen=True)
class Rewriting:
    """How a captured graph is rewritten before it is planned.

    Attributes:
        packs: masks are kept as bits, pooling indices as small integers.
        head_chunks: row chunks of the loss head, 1 where it runs whole.
        layer_chunks: of MLPs and other layers with much in memory, 1 where they run whole.
    """

    packs: bool = False
    head_chunks: int = 1
    layer_chunks: int = 1

    @property
    def keeps_order(self) -> bool:
        """Whether sums are rounded in the captured order."""
        return self.head_chunks == self.layer_chunks == 1


@dataclass(frozen=True)
class Part:
    """One captured size of microbatch, and how it runs.

    Attributes:
        num_rows: of the microbatch; None for a batch that runs as a whole.
        capture: runs the installed program.
        captured: the joint graph; its real inputs are let go of.
        step: the whole step behind it.
        plan: its schedule.
        parameter_of: primal -> trained parameter.
        streamed_of: primal -> parameter or buffer of the model that is streamed.
    """

    num_rows: int | None
    capture: StepCapture
    captured: CapturedLoss
    step: WholeStep
    plan: Plan
    parameter_of: dict[int, nn.Parameter]
    streamed_of: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way to run the step.

    Attributes:
        parts: one, or two where the last microbatches are smaller.
        counts: how many microbatches run as each part.
        memory: bytes outside of the schedule.
        consumption: what happens to gradients.
        finish_seconds: of the update after the last schedule.
        rewriting: of every part's graph.
        layers_in_chunks: how many layers of each kind run in chunks.
        loss_weight: of microbatches.
        streaming: which parameters and what of the optimizer's state lie on the tier between uses.
        device: with the link that transfers take, if there is one.
        num_parameters: of the model.
        not_made: move -> why it is not part of this.
    """

    parts: tuple[Part, ...]
    counts: tuple[int, ...]
    memory: StepMemory
    consumption: Consumption
    finish_seconds: float = 0.0
    rewriting: Rewriting = Rewriting()
    layers_in_chunks: dict[str, int] = field(default_factory=dict)
    loss_weight: LossWeight | None = None
    streaming: Streaming = field(default_factory=Streaming)
    device: Device | None = None
    num_parameters: int = 0
    not_made: dict[str, str] = field(default_factory=dict)

    @property
    def num_microbatches(self) -> int:
        """How often a schedule runs for one update."""
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        """Predicted duration of the whole step."""
        runs = zip(self.parts, self.counts, strict=True)
        return sum(part.plan.seconds * count for part, count in runs) + self.finish_seconds

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step."""
        return self.memory.peak_bytes(max(part.plan.peak_bytes for part in self.parts))

    @property
    def is_bit_exact(self) -> bool:
        """Whether sums are rounded in the plain step's order."""
        return self.num_microbatches == 1 and self.rewriting.keeps_order

    @property
    def slowdown(self) -> float:
        """Predicted duration over that of the same calls without recomputation or transfers."""
        return max(part.plan.slowdown for part in self.parts)

    @property
    def num_transfers(self) -> int:
        """How many buffers leave memory in one run of the schedule."""
        return len(self.written_buffers)

    @property
    def written_buffers(self) -> list[int]:
        """The buffers that leave memory in one run of the schedule, those not written left out."""
        schedule = self.parts[0].plan.schedule
        return [i.target for i in schedule.instructions if i.action is Action.OFFLOAD]

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done that costs time."""
        return all(part.plan.slowdown <= 1.0 + 1e-9 for part in self.parts) and not self.streaming
