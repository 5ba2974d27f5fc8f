"""A way together with what it needs to run here: traced losses, parameters, streamed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from packlight.capture.whole_step import Consumption, WholeStep
from packlight.moves.draft import Traced
from packlight.moves.microbatch.denominator import Measure
from packlight.moves.microbatch.split import LossWeight
from packlight.moves.reduction import Reduction
from packlight.moves.sharding import Sharding
from packlight.moves.stream.streamed import Streaming
from packlight.ranks.pieces import Pieces
from packlight.search.way import Way
from packlight.step import Plan


@dataclass(frozen=True)
class ReadyPart:
    """One size of (micro)batch, ready to run.

    Attributes:
        traced: the loss; its real inputs are let go of.
        step: the whole step behind it.
        plan: its schedule.
        parameter_of: primal -> trained parameter.
        streamed_of: primal -> parameter or buffer of the model that is streamed, or gathered.
    """

    traced: Traced
    step: WholeStep
    plan: Plan
    parameter_of: Mapping[int, nn.Parameter]
    streamed_of: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def written_buffers(self) -> list[int]:
        """The buffers that are written away in one run of the schedule."""
        return self.step.joint.graph.written(self.plan.schedule)


@dataclass(frozen=True)
class Ready:
    """A way that can run in this process.

    Attributes:
        way: as data.
        parts: in the order of the way's.
        gradients: what happens to them.
        streaming: what of parameters and optimizer state lies elsewhere between uses.
        loss_weight: of microbatches; None where the batch runs as a whole.
        reduction: how gradients are added up over ranks, where there are several.
        rank_weight: what then weighs their losses.
        rank_measure: what this rank's example adds to that.
    """

    way: Way
    parts: tuple[ReadyPart, ...]
    gradients: Consumption
    streaming: Streaming
    loss_weight: LossWeight | None = None
    reduction: Reduction | None = None
    rank_weight: LossWeight | None = None
    rank_measure: Measure | float = 1.0

    @property
    def in_pieces(self) -> Mapping[nn.Parameter, Pieces]:
        """The parameters that lie in pieces with all ranks, and who has which rows."""
        return self.sharding.pieces

    @property
    def sharding(self) -> Sharding:
        """... and what that holds."""
        return Sharding() if self.reduction is None else self.reduction.sharding

    @property
    def seconds(self) -> float:
        """Predicted duration of the step."""
        return self.way.seconds

    @property
    def slowdown(self) -> float:
        """... over that of the same calls without recomputation or transfers."""
        return self.way.slowdown

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done that costs time."""
        return self.way.is_plain
