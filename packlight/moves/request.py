"""What `fit` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from packlight.capture.step_capture import LossFunction
from packlight.moves.microbatch.split import LossWeight
from packlight.ranks.group import Ranks
from packlight.ranks.modelled import ModelledMesh
from packlight.ranks.pieces import Placement
from packlight.updates.gradients import Clipping

Beside = torch.optim.Optimizer | nn.Module | torch.Tensor


@dataclass(frozen=True)
class Request:
    """What `fit` was asked for.

    Attributes:
        model, optimizer: the user's; no optimizer where nothing is to be trained.
        loss_fn: the user's.
        budget_bytes: for the whole step, None for no limit.
        moves: names of those that may be made.
        allow: names of approximate techniques.
        clipping: of gradients.
        scaler: scales the loss: the user's, or made for fp16.
        loss_weight: what the user says a microbatch's loss is divided by, if anything.
        offload_directory: where buffers may be offloaded to.
        progress: show what profiling does.
        ranks: that train together, by one plan; None for one process.
        data_ranks: those of them that have parts of the batch each.
        tensor_ranks: those of them that have parts of the weights each, and the same batch.
        modelled: ranks that are planned for and not there.
        spoken: names of torch's groups in which the model's own ranks tell one another things.
        placements: where parameters in pieces may lie, the fastest first; none for whole ones.
        accumulates: gradients of several batches are added up before an update.
        beside: optimizers, modules and tensors that the loop keeps while the step runs.
        max_gradient_error: how wrong approximations may make the gradient, relative to its norm;
            None where the user names no limit.
        shard_ranks: those of `data_ranks` that have pieces of parameters each; all, mostly.
        replica_ranks: those with the same pieces, where there are several.
        is_weightless: the model has no values: nothing of it can run.
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
    ranks: Ranks | None = None
    data_ranks: Ranks | None = None
    tensor_ranks: Ranks | None = None
    modelled: ModelledMesh | None = None
    placements: tuple[Placement, ...] = ()
    spoken: tuple[str, ...] = ()
    accumulates: bool = False
    beside: tuple[Beside, ...] = ()
    max_gradient_error: float | None = None
    shard_ranks: Ranks | None = None
    replica_ranks: Ranks | None = None
    is_weightless: bool = False

    @property
    def shards(self) -> bool:
        """Whether parameters lie in pieces with all ranks."""
        return bool(self.placements)

    @property
    def is_talkative(self) -> bool:
        """Whether the model needs all ranks to run: none of them can look at some rows alone."""
        return bool(self.spoken)

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether ranks have parts of the weights."""
        return self.tensor_ranks is not None

    @property
    def num_ranks(self) -> int | None:
        """How many have a part of the batch each; None for one."""
        if self.modelled is not None:
            return self.modelled.num_ranks
        return None if self.data_ranks is None else self.data_ranks.size

    @property
    def num_shards(self) -> int | None:
        """How many have a piece of a parameter each, where it lies in pieces."""
        if self.modelled is not None:
            return self.modelled.shard or self.modelled.data
        return None if self.shard_ranks is None else self.shard_ranks.size
