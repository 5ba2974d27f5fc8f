"""One row's memory and time, and its training runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

import packlight
from benchmarks.common import quartiles, timed
from benchmarks.sohoni.records import Record
from benchmarks.sohoni.rows import ROWS, Row, loss_fn
from examples import wrn_cifar10
from packlight.capture.batch import tensors_of
from packlight.errors import InfeasibleBudgetError
from packlight.run.checkpoint import newest_checkpoint, save_checkpoint
from packlight.search.words import moves_of
from packlight.step import live_after_forward
from packlight.updates.accounting import tensors_bytes

BATCH = wrn_cifar10.BATCH
CPU = torch.device("cpu")
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """How long a run trains, and on what.

    Attributes:
        num_images: the first so many of the training set.
        num_epochs: over those.
        learning_rate: at its highest: it rises over the first tenth and falls to 0 in a cosine.
        num_tested: the first so many images of the test set.
    """

    num_images: int = 10_000
    num_epochs: int = 12
    learning_rate: float = 0.1
    num_tested: int = 10_000

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.num_epochs * (self.num_images // BATCH)

    def factor(self, step: int) -> float:
        """Return the learning rate at a step, over the highest."""
        warm = max(1, self.num_steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.num_steps - warm)))


class Trainee:
    """A row's model, optimizer and step.

    Attributes:
        step: trains on one batch and returns the loss.
        fitted: Packlight's step behind that, if it is one.
    """

    def __init__(self, row: Row, seed: int, learning_rate: float, batch: Batch) -> None:
        self.row = row
        self.model = row.model(seed)
        self.optimizer = row.optimizer(self.model, learning_rate)
        self.fitted: packlight.TrainStep | None = None
        if not row.is_eager:
            self.fitted = self._fitted(row.batch(*batch))
        self.step: Callable[[Batch], torch.Tensor] = self.fitted or self._eager_step

    def _fitted(self, batch: Batch) -> packlight.TrainStep:
        budget_bytes = self.row.budget_bytes
        while True:
            try:
                return packlight.fit(
                    self.model, loss_fn, self.optimizer, batch, budget_bytes,
                    allow=self.row.allow, progress=False,
                )
            except InfeasibleBudgetError as error:
                if budget_bytes != 1:
                    raise
                budget_bytes = error.smallest_bytes  # as little as it takes

    def _eager_step(self, batch: Batch) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(self.model, batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @property
    def state_bytes(self) -> int:
        """Of the optimizer."""
        return tensors_bytes([t for s in self.optimizer.state.values() for t in tensors_of(s)])

    def resident_bytes(self, batch: Batch) -> int:
        """Return what is there before a step."""
        held = tensors_bytes([*self.model.parameters(), *self.model.buffers(), *batch])
        return held + self.state_bytes

    def accuracy(self, num_tested: int) -> float:
        """Return percent of the test set's first images that the model gets right."""
        self.model.eval()
        right = seen = 0
        with torch.no_grad():
            for images, labels in wrn_cifar10.batches("validation"):
                images, labels = self.row.batch(images, labels)
                right += int((self.model(images).argmax(1) == labels).sum())
                seen += len(labels)
                if seen >= num_tested:
                    break
        self.model.train()
        return 100 * right / seen


def example_batch() -> Batch:
    """Return a batch of random numbers: memory and time do not depend on them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def measure_memory(record: Record, num_rounds: int) -> None:
    """Fill in a row's peaks, moves, and time beside fp32 eager steps."""
    row = ROWS[record.row]
    batch = example_batch()
    mine = row.batch(*batch)
    trainee = Trainee(row, 0, 1e-3, batch)
    peaks = []
    for _ in range(2):  # the optimizer makes its state in the first
        before = trainee.resident_bytes(mine)
        peaks.append(before + packlight.measure_peak(partial(trainee.step, mine)).peak_bytes)
    record.peak_bytes = max(peaks)
    # Weights, gradients and momentum.
    states_bytes = 2 * sum(p.nbytes for p in trainee.model.parameters()) + trainee.state_bytes
    if trainee.fitted is None:
        record.paper_bytes = states_bytes + _saved_bytes(trainee.model, mine)
    else:
        way = trainee.fitted.way
        part = trainee.fitted.ready.parts[0]
        graph = part.step.joint.graph
        kept = live_after_forward(graph, part.plan.schedule)
        record.budget_bytes = trainee.fitted.budget_bytes
        record.predicted_peak_bytes = trainee.fitted.peak_bytes
        record.paper_bytes = states_bytes + sum(graph.buffers[b].bytes for b in kept)
        record.moves = moves_of(way)
    eager = Trainee(ROWS["fp32"], 0, 1e-3, batch)
    ratios, seconds = [], []
    for _ in range(num_rounds):
        base = timed(lambda: eager.step(batch), CPU)
        seconds.append(timed(lambda: trainee.step(mine), CPU))
        ratios.append(seconds[-1] / base)
    record.ratio_median, record.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
    record.seconds_median, record.num_rounds = statistics.median(seconds), num_rounds


def _saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that autograd keeps for the backward, each storage once, weights not."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = loss_fn(model, batch)
    del loss
    return sum(storages.values())


def train(record: Record, training: Training, folder: Path, progress: Progress) -> None:
    """Train a row with a seed, going on from its last checkpoint; fill in its accuracy."""
    row, seed = ROWS[record.row], record.seed
    assert seed is not None
    images, labels = (t[: training.num_images] for t in wrn_cifar10.read_cifar10(True))
    first = (wrn_cifar10.normalized(images[:BATCH]), labels[:BATCH])
    trainee = Trainee(row, seed, training.learning_rate, first)
    folder = folder / f"{row.name}-{seed}-{training.num_images}-{training.num_epochs}"
    losses: list[float] = []
    taken = 0.0
    epoch = 0
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        checkpoint.restore(trainee.model, trainee.optimizer)
        epoch, losses, taken = (checkpoint.extra[k] for k in ("epoch", "losses", "seconds"))
    task = progress.add_task(f"{row.name}, seed {seed}", total=training.num_steps)
    step = epoch * (training.num_images // BATCH)
    while epoch < training.num_epochs:
        begin, total = time.perf_counter(), 0.0
        for batch in _epoch(images, labels, 1000 * seed + epoch):
            for group in trainee.optimizer.param_groups:
                group["lr"] = training.learning_rate * training.factor(step)
            total += float(trainee.step(row.batch(*batch)))
            step += 1
            progress.update(task, completed=step)
        epoch += 1
        losses.append(total / (training.num_images // BATCH))
        taken += time.perf_counter() - begin
        extra = {"epoch": epoch, "losses": losses, "seconds": taken}
        save_checkpoint(folder, trainee.model, trainee.optimizer, step=step, extra=extra)
    record.losses, record.train_seconds = losses, taken
    record.accuracy = trainee.accuracy(training.num_tested)
    progress.remove_task(task)


def _epoch(images: torch.Tensor, labels: torch.Tensor, seed: int) -> Iterator[Batch]:
    """Yield an epoch's batches, shuffled and augmented: the same ones for every row."""
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield wrn_cifar10.normalized(wrn_cifar10.augmented(images[chosen])), labels[chosen]
