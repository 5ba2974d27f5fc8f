"""The ways to train one model on several ranks that are put side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import packlight
from benchmarks.common import MEBIBYTE
from packlight.costs.levels import LevelRecorder
from tests.models import ReferenceGPT, call_pair

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY, ROWS = 6, 256, 4, 256, 2048, 2
STEPS_BEFORE = 2  # in which states are made

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Mode:
    """One way to train.

    Attributes:
        name: in tables.
        shards: whether parameters lie in pieces.
        budget_mebibytes: of Packlight's; None for none.
        checkpoints: each block is run again in the backward (`torch.utils.checkpoint`).
        is_ours: Packlight's.
        is_exact: without moves that change the order of sums.
    """

    name: str
    shards: bool = False
    budget_mebibytes: int | None = None
    checkpoints: bool = False
    is_ours: bool = False
    is_exact: bool = False


MODES = (
    Mode("DDP"),
    Mode("DDP, checkpoint", checkpoints=True),
    Mode("FSDP2", shards=True),
    Mode("FSDP2, checkpoint", shards=True, checkpoints=True),
    Mode("Packlight", is_ours=True),
    Mode("Packlight, 95 MiB, exact moves", False, 95, is_ours=True, is_exact=True),
    Mode("Packlight, sharded", shards=True, is_ours=True),
    Mode("Packlight, sharded, 69 MiB, exact moves", True, 69, is_ours=True, is_exact=True),
    Mode("Packlight, sharded, 55 MiB", True, 55, is_ours=True),
)


@dataclass
class Trained:
    """What became of a few steps.

    Attributes:
        peak_bytes: the most that this rank's allocator held of model, optimizer and step.
        predicted_bytes: by Packlight.
        predicted_seconds: by Packlight.
        seconds: of each timed step.
        losses: of all steps, each of this rank's part (ours: of the whole batch).
        parameters: at the end, whole.
    """

    peak_bytes: int
    predicted_bytes: int | None
    predicted_seconds: float | None
    seconds: list[float]
    losses: list[float]
    parameters: list[torch.Tensor]


def model_and_batches(num_batches: int) -> tuple[nn.Module, list[Batch]]:
    """Return the model, the same on all ranks, and this rank's part of the batches."""
    torch.manual_seed(0)
    model = ReferenceGPT(LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY)
    batches = []
    for index in range(num_batches):
        generator = torch.Generator().manual_seed(1000 * index + dist.get_rank())
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        batches.append((tokens, tokens.roll(-1, 1)))
    return model, batches


def train(mode: Mode, num_timed: int, clock: Callable[[], float]) -> Trained:
    """Train by a mode: steps in which states are made, one whose peak is measured, timed ones."""
    return (_train_ours if mode.is_ours else _train_by_torch)(mode, num_timed, clock)


def _train_ours(mode: Mode, num_timed: int, clock: Callable[[], float]) -> Trained:
    model, batches = model_and_batches(STEPS_BEFORE + 1 + num_timed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    budget = None if mode.budget_mebibytes is None else mode.budget_mebibytes * MEBIBYTE
    parallel = packlight.Parallel(shard="data") if mode.shards else packlight.Parallel()
    step = packlight.fit(
        model, call_pair, _adamw(model), batches[0], budget, mesh=mesh, parallel=parallel,
        progress=False, moves=packlight.EXACT_MOVES if mode.is_exact else None,
    )
    losses = [float(step(batch)) for batch in batches[:STEPS_BEFORE]]
    measured = step.measured(batches[STEPS_BEFORE])
    losses.append(float(measured.loss))
    seconds, more = _timed(step, batches[STEPS_BEFORE + 1 :], clock)
    with step.whole_parameters():
        parameters = [p.detach().clone() for p in model.parameters()]
    return Trained(
        measured.peak_bytes, step.peak_bytes, step.way.seconds, seconds, losses + more, parameters
    )


def _train_by_torch(mode: Mode, num_timed: int, clock: Callable[[], float]) -> Trained:
    levels = LevelRecorder(torch.device("cpu"))
    model, batches = model_and_batches(STEPS_BEFORE + 1 + num_timed)
    wrapped, blocks = model, model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    if mode.checkpoints:
        for block in blocks:
            _checkpointed(block)
    if mode.shards:
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = _adamw(model)

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad()
        loss = call_pair(wrapped, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [float(step(batch)) for batch in batches[:STEPS_BEFORE]]
    levels.mark()
    losses.append(float(step(batches[STEPS_BEFORE])))
    levels.mark()
    peak = levels.stop()[-1].peak_bytes
    seconds, more = _timed(step, batches[STEPS_BEFORE + 1 :], clock)
    parameters = [_whole(p) for p in model.parameters()]
    return Trained(peak, None, None, seconds, losses + more, parameters)


def _checkpointed(block: nn.Module) -> None:
    forward = block.forward

    def again(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    block.forward = again  # type: ignore[method-assign]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered.detach().clone()


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _timed(
    step: Callable[[Batch], torch.Tensor], batches: list[Batch], clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    seconds, losses = [], []
    for batch in batches:
        dist.barrier()
        begin = clock()
        losses.append(float(step(batch)))
        dist.barrier()
        seconds.append(clock() - begin)
    return seconds, losses

