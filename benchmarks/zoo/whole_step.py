"""Cells through `packlight.fit`: two AdamW steps beside eager PyTorch's, everything counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import packlight
from benchmarks.common import same_bits
from benchmarks.workbench import whole_peak
from benchmarks.zoo.outcome import LossFn, Start, norm_of_difference, run_traced
from benchmarks.zoo.records import EXACT, SMALLEST, Record
from packlight.errors import InfeasibleBudgetError
from packlight.search.words import moves_of
from tests.zoo.families import make

NUM_STEPS = 2
NUM_SMALLEST_TRIES = 3
LEARNING_RATE = 1e-3

Step = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What some steps leave behind.

    Attributes:
        results: losses, parameters, buffers, optimizer state and the generator's, by name.
        first_moments: Adam's after the first step, which are a tenth of the gradients.
        peak_bytes: the highest of the steps' whole peaks.
        draws: whether random numbers were drawn.
    """

    results: dict[str, torch.Tensor]
    first_moments: dict[str, torch.Tensor]
    peak_bytes: int
    draws: bool

    def differences(self, other: Trained) -> list[str]:
        """Return the names of results of which a bit differs."""
        assert self.results.keys() == other.results.keys()
        return [
            name for name, mine in self.results.items() if not same_bits(mine, other.results[name])
        ]

    def gradient_error(self, other: Trained) -> float:
        """Return how far the first step's gradients are from others', over the norm of those."""
        return norm_of_difference(self.first_moments, other.first_moments)


class Trainee:
    """A model and its optimizer, which eager PyTorch and Packlight train in turns."""

    def __init__(self, name: str, dropout: float, seed: int) -> None:
        self.model, self.batch, self.loss_fn = make(name, dropout, seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.start = Start(self.model)

    def train(self, step: Step) -> Trained:
        """Train from the start, with a new optimizer state."""
        self.start.restore()
        self.optimizer.state.clear()
        before = torch.get_rng_state()
        results, first_moments, peaks = {}, {}, []
        for index in range(NUM_STEPS):
            peak = whole_peak(step, self.model, [self.optimizer], self.batch)
            results[f"loss {index + 1}"] = peak.result.clone()
            peaks.append(peak.peak_bytes)
            if index == 0:
                states = self._states()
                first_moments = {n: t for n, t in states.items() if n.endswith(".exp_avg")}
        results["generator"] = torch.get_rng_state()
        results |= {name: p.detach().clone() for name, p in self.model.named_parameters()}
        results |= {f"buffer {name}": b.clone() for name, b in self.model.named_buffers()}
        results |= self._states()
        draws = not torch.equal(before, results["generator"])
        return Trained(results, first_moments, max(peaks), draws)

    def _states(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": value.clone()
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }

    def loop(self, loss_fn: LossFn) -> Step:
        """Return a plain step: zero_grad, forward, backward, update."""

        def step(batch: Any) -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(self.model, batch)
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        return step

    def fit(self, budget_bytes: int, moves: tuple[str, ...]) -> packlight.TrainStep:
        """Return Packlight's step."""
        self.start.restore()
        self.optimizer.state.clear()
        return packlight.fit(
            self.model, self.loss_fn, self.optimizer, self.batch, budget_bytes, moves=moves,
            progress=False,
        )

    def fit_smallest(self, record: Record, moves: tuple[str, ...]) -> packlight.TrainStep:
        """Return the step with the smallest budget, as errors name it.

        Where a budget that an error named is refused, the one that is named then is asked for;
        `record.refused_bytes` has those.
        """
        record.budget_bytes = self.smallest_bytes(moves)
        while True:
            try:
                return self.fit(record.budget_bytes, moves)
            except InfeasibleBudgetError as error:
                record.refused_bytes.append(record.budget_bytes)
                if len(record.refused_bytes) == NUM_SMALLEST_TRIES:
                    raise
                record.budget_bytes = error.smallest_bytes

    def smallest_bytes(self, moves: tuple[str, ...]) -> int:
        """Return the budget that the error about a budget of one byte names."""
        try:
            self.fit(1, moves)
        except InfeasibleBudgetError as error:
            return error.smallest_bytes
        raise AssertionError("a step that fits into a byte")


def measure_fit(record: Record, seed: int) -> None:
    """Train by `fit` for a record's budget, and fill in what that shows beside eager PyTorch."""
    trainee = Trainee(record.family, record.dropout, seed)
    moves = packlight.EXACT_MOVES if record.path == EXACT else packlight.MOVES
    eager = trainee.train(trainee.loop(trainee.loss_fn))
    record.eager_peak_bytes, record.draws = eager.peak_bytes, eager.draws
    begin = time.perf_counter()
    if record.setting == SMALLEST:
        step = trainee.fit_smallest(record, moves)
    else:
        smallest_bytes = trainee.smallest_bytes(moves)
        begin = time.perf_counter()
        # A step can be so small that eager PyTorch's holds less than what is promised.
        record.budget_bytes = (smallest_bytes + max(smallest_bytes, eager.peak_bytes)) // 2
        step = trainee.fit(record.budget_bytes, moves)
    record.capture_seconds = time.perf_counter() - begin
    way = step.way
    record.moves, record.is_exact = moves_of(way), way.is_bit_exact
    record.predicted_peak_bytes, record.slowdown = step.peak_bytes, way.slowdown
    record.num_operations = step.ready.parts[0].step.joint.graph.num_computations
    mine = trainee.train(step)
    record.peak_bytes = mine.peak_bytes
    record.differences = mine.differences(eager)
    unplanned = eager
    if record.differences:
        unplanned, record.is_traced_by_torch = run_traced(
            trainee.loss_fn, lambda loss_fn: trainee.train(trainee.loop(loss_fn)),
            lambda trained: trained.gradient_error(eager),
        )
        record.traced_differences = mine.differences(unplanned)
    record.relative_error = mine.gradient_error(unplanned)
