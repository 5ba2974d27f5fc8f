"""The pipelines that are put side by side: the same model, batch and optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

import packlight
from packlight.costs.levels import LevelRecorder
from tests.models import GPTBlock, ReferenceGPT, call_pair

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY, ROWS, MICROBATCHES = 4, 128, 4, 128, 512, 8, 4
STEPS_BEFORE = 2  # in which states are made

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Mode:
    """One pipeline.

    Attributes:
        name: in tables.
        schedule: of Packlight's or, for torch's, its class.
        chunks: stages on each rank.
        part: of what Packlight's pipeline holds at most without a budget; None for no budget.
    """

    name: str
    schedule: Any
    chunks: int = 1
    part: float | None = None


MODES = (
    Mode("torch GPipe", ScheduleGPipe),
    Mode("torch 1F1B", Schedule1F1B),
    Mode("torch interleaved 1F1B", ScheduleInterleaved1F1B, 2),
    Mode("torch interleaved zero bubble", ScheduleInterleavedZeroBubble, 2),
    Mode("GPipe", "gpipe"),
    Mode("1F1B", "1f1b"),
    Mode("interleaved 1F1B", "1f1b", 2),
    Mode("ZB-H1", "zb-h1"),
    Mode("ZB-H2", "zb-h2"),
    Mode("GPipe, 0.8", "gpipe", 1, 0.8),
    Mode("1F1B, 0.85", "1f1b", 1, 0.85),
    Mode("Varuna, 0.85", "varuna", 1, 0.85),
    Mode("ZB-H1, 0.85", "zb-h1", 1, 0.85),
)


@dataclass
class Trained:
    """What one rank saw of a few steps.

    Attributes:
        peak_bytes: the most that its allocator held of model, optimizer and step.
        predicted_bytes, predicted_seconds, bubble: by Packlight.
        seconds: of each timed step.
        loss: of the last step, 0 where another rank has it.
    """

    peak_bytes: int
    predicted_bytes: int | None
    predicted_seconds: float | None
    bubble: float | None
    seconds: list[float]
    loss: float


def batches(count: int) -> list[Batch]:
    """Return batches, the same on all ranks."""
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        found.append((tokens, tokens.roll(-1, 1)))
    return found


class Part(nn.Module):
    """Consecutive blocks, with embeddings before the first and the head behind the last."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        each = LAYERS // num_stages
        if self.is_first:
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([GPTBlock(WIDTH, HEADS, 0.0) for _ in range(each)])
        if self.is_last:
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the next part takes, or logits."""
        if self.is_first:
            x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.is_last else x


def train(mode: Mode, num_timed: int, smaller: dict[str, int]) -> Trained:
    """Train by a mode: steps in which states are made, one whose peak is measured, timed ones.

    Args:
        mode: which.
        num_timed: steps.
        smaller: what Packlight's pipelines hold at most without a budget, by name; added to.
    """
    ours = isinstance(mode.schedule, str)
    levels = None if ours else LevelRecorder(torch.device("cpu"))
    torch.manual_seed(0)
    step, told, resident = _ours(mode, smaller) if ours else _torchs(mode)
    everything = batches(STEPS_BEFORE + 1 + num_timed)
    measured, timed = everything[STEPS_BEFORE], everything[STEPS_BEFORE + 1 :]
    for batch in everything[:STEPS_BEFORE]:
        step(batch)
    if levels is None:
        peak = resident(measured) + packlight.measure_peak(lambda: step(measured)).peak_bytes
    else:
        del everything
        levels.mark()
        step(measured)
        levels.mark()
        peak = levels.stop()[-1].peak_bytes
    seconds, loss = [], 0.0
    for batch in timed:
        dist.barrier()
        begin = time.perf_counter()
        loss = step(batch)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return Trained(peak, *told, seconds, loss)


def _ours(
    mode: Mode, smaller: dict[str, int]
) -> tuple[Callable[[Batch], float], Any, Callable[[Batch], int]]:
    model = ReferenceGPT(LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    key = f"{mode.schedule} {mode.chunks}"
    budget = None
    if mode.part is not None:
        budget = int(mode.part * smaller.get(key, smaller["1f1b 1"]))
    step = packlight.fit_pipeline(
        model, call_pair, optimizer, batches(1)[0], budget, mesh=mesh, schedule=mode.schedule,
        num_microbatches=MICROBATCHES, stages_per_rank=mode.chunks, progress=False,
    )
    if budget is None:
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, step.peak_bytes)
        smaller[key] = max(everybody)
    told = step.peak_bytes, step.predicted_seconds, step.timeline.bubble

    def resident(batch: Batch) -> int:
        states = [v for state in optimizer.state.values() for v in state.values()]
        held = [*model.parameters(), *filter(torch.is_tensor, states), *batch]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in held}.values())

    return lambda batch: float(step(batch)), told, resident


def _torchs(
    mode: Mode
) -> tuple[Callable[[Batch], float], Any, Callable[[Batch], int]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    num_stages, device = size * mode.chunks, torch.device("cpu")
    parts = [Part(stage, num_stages) for stage in range(rank, num_stages, size)]
    stages = [
        PipelineStage(part, stage, num_stages, device)
        for part, stage in zip(parts, range(rank, num_stages, size), strict=True)
    ]

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    schedule = mode.schedule(
        stages if mode.chunks > 1 else stages[0], MICROBATCHES, loss_fn=loss_of
    )
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-3)

    def step(batch: Batch) -> float:
        losses: list[torch.Tensor] = []
        is_last = any(part.is_last for part in parts)
        given = (batch[0],) if any(part.is_first for part in parts) else ()
        schedule.step(
            *given, target=batch[1] if is_last else None, losses=losses if is_last else None,
            return_outputs=False,
        )
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(x.detach() for x in losses)) / MICROBATCHES if losses else 0.0

    return step, (None, None, None), lambda batch: 0
