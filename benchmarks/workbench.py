"""One training step, anyone's: what it computes, holds and takes."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import packlight
from benchmarks.common import quartiles, same_bits, timed
from benchmarks.models import Built, LossFn
from packlight.errors import InfeasibleBudgetError
from packlight.search.way import Way
from packlight.updates.accounting import batch_bytes, tensors_bytes

Step = Callable[[Any], torch.Tensor]

NUM_SMALLEST_TRIES = 3


@dataclass(kw_only=True)
class Measured:
    """What was measured of one step; lines of results have these beside their own.

    Attributes:
        first_peak_bytes: peak of the first step, in which the optimizer makes its state.
        later_peak_bytes: peak of a later step.
        ratio_median, ratio_quartiles: time over that of eager steps in the same round.
        num_rounds: how many rounds those are taken over.
        seconds_median, eager_seconds_median: durations of a step.
        loss_difference: from eager's first loss, over that loss.
        same_bits: whether what eager's first step leaves is left to the last bit.
        update_error: norm of the difference from eager's first update over that update's norm; the
            same for each kind of optimizer state that both keep alike; the largest of these.
    """

    first_peak_bytes: int | None = None
    later_peak_bytes: int | None = None
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    num_rounds: int = 0
    seconds_median: float | None = None
    eager_seconds_median: float | None = None
    loss_difference: float | None = None
    same_bits: dict[str, bool] | None = None
    update_error: float | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The larger of the measured peaks: everything resident included."""
        if self.first_peak_bytes is None or self.later_peak_bytes is None:
            return None
        return max(self.first_peak_bytes, self.later_peak_bytes)

    def set_times(
        self, seconds: Sequence[float], eager_seconds: Sequence[float], ratios: Sequence[float]
    ) -> None:
        """Fill in what a few rounds showed."""
        self.num_rounds = len(ratios)
        self.seconds_median = statistics.median(seconds)
        self.eager_seconds_median = statistics.median(eager_seconds)
        self.ratio_median, self.ratio_quartiles = statistics.median(ratios), quartiles(ratios)


@dataclass(frozen=True)
class Reference:
    """What eager PyTorch's first step computes.

    Attributes:
        loss: the first.
        results: "parameters", "buffers", and the optimizer's state by its name, after the step.
        initial: parameters before it.
    """

    loss: torch.Tensor
    results: dict[str, list[torch.Tensor]]
    initial: list[torch.Tensor]


def resident_bytes(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Any,
    step: Step | None = None,
) -> int:
    """Return the size of what is there between steps: model, optimizer state and batch.

    Args:
        model: what is trained.
        optimizers: by which.
        batch: on what.
        step: what it keeps on a disk between steps is left out.
    """
    states = [s.values() for optimizer in optimizers for s in optimizer.state.values()]
    there = [*model.parameters(), *model.buffers(), *(t for s in states for t in _inner_tensors(s))]
    if isinstance(step, packlight.TrainStep):
        there = [t for t in there if not step.is_on_disk(t)]
    return tensors_bytes(there) + batch_bytes(batch)


def whole_peak(
    step: Step, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Any
) -> packlight.MemoryPeak:
    """Run a step on a batch; its peak counts what was there before and what it added."""
    before = resident_bytes(model, optimizers, batch, step)
    device = next(model.parameters()).device
    peak = packlight.measure_peak(lambda: step(batch), device)
    return replace(peak, peak_bytes=before + peak.peak_bytes)


class Workbench:
    """One model and its optimizer, which steps of any kind train.

    Args:
        built: the model.
        optimizers: one, or several that share the parameters among them.
        seed: of what is drawn within a step.
    """

    def __init__(
        self, built: Built, optimizers: Sequence[torch.optim.Optimizer], device: str, seed: int
    ) -> None:
        self.built, self.optimizers, self.seed = built, list(optimizers), seed
        self.device = torch.device(device)
        self.parameters = list(built.model.parameters())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only optimizer."""
        (optimizer,) = self.optimizers
        return optimizer

    def eager_step(self, loss_fn: LossFn) -> Step:
        """Return the plain step; `loss_fn` may call `backward` for all but the last microbatch."""

        def step(batch: Any) -> torch.Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(self.built.model, batch)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            return loss.detach()

        return step

    def begin(self, is_first: bool = False) -> None:
        """Set weights, statistics and generators to where the first step found them.

        Args:
            is_first: forget the optimizers' state, too.
        """
        self.built.model.load_state_dict(self.built.initial)
        self.built.model.zero_grad(set_to_none=True)
        if is_first:
            for optimizer in self.optimizers:
                optimizer.state.clear()
        torch.manual_seed(self.seed + 1)

    # -- what a step holds and computes

    def look_at(self, measured: Measured, step: Step, reference: Reference | None = None) -> None:
        """Fill in peaks and what the first step computes beside eager's.

        Args:
            measured: where.
            step: trains this model with these optimizers.
            reference: eager's first step; by default, that of the same model and optimizer.
        """
        if reference is None:
            reference = self.reference
        self.begin(is_first=True)
        loss, measured.first_peak_bytes = self._peak_of(step)
        self._compare(measured, loss, reference)
        self.begin()
        _, measured.later_peak_bytes = self._peak_of(step)

    def resident_bytes(self, step: Step | None = None) -> int:
        """Return the size of what is there between steps; see `resident_bytes`."""
        return resident_bytes(self.built.model, self.optimizers, self.built.batch, step)

    def _peak_of(self, step: Step) -> tuple[torch.Tensor, int]:
        """Run a step; return its loss and its whole peak."""
        peak = whole_peak(step, self.built.model, self.optimizers, self.built.batch)
        return peak.result, peak.peak_bytes

    @cached_property
    def reference(self) -> Reference:
        """What the plain step computes."""
        self.begin(is_first=True)
        loss = self.eager_step(self.built.loss_fn)(self.built.batch)
        copies = {name: [t.clone() for t in found] for name, found in self._results().items()}
        return Reference(loss, copies, self._initial())

    def _initial(self) -> list[torch.Tensor]:
        return [self.built.initial[name] for name, _ in self.built.model.named_parameters()]

    def _states(self) -> Iterator[dict[str, Any]]:
        """Yield the state of each parameter that has any, in the parameters' order."""
        for p in self.parameters:
            for optimizer in self.optimizers:
                if p in optimizer.state:
                    yield optimizer.state[p]

    def _results(self) -> dict[str, list[torch.Tensor]]:
        """Return what a step has written."""
        found = {"parameters": [p.detach() for p in self.parameters]}
        buffers = list(self.built.model.buffers())
        if buffers:
            found["buffers"] = buffers
        for values in self._states():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    found.setdefault(name, []).append(value)
        return found

    def _compare(self, measured: Measured, loss: torch.Tensor, reference: Reference) -> None:
        results = self._results()
        measured.loss_difference = float(
            (loss.double() - reference.loss.double()).abs() / reference.loss.double().abs()
        )
        measured.same_bits = {"loss": same_bits(loss, reference.loss)}
        errors = []
        for kind, theirs in reference.results.items():
            mine = results.get(kind, [])
            if not _are_alike(mine, theirs):  # kept in another form: nothing to compare
                continue
            measured.same_bits[kind] = all(map(same_bits, mine, theirs))
            starts: list[tuple[Any, Any]] = [(0.0, 0.0)] * len(theirs)
            if kind == "parameters":  # the update counts, not what was there before
                starts = list(zip(self._initial(), reference.initial, strict=True))
            off = total = 0.0
            for a, b, (my_start, their_start) in zip(mine, theirs, starts, strict=True):
                update = b.double() - their_start
                off += float((a.double() - my_start - update).square().sum())
                total += float(update.square().sum())
            errors.append((off / total) ** 0.5 if total else 0.0)
        measured.update_error = max(errors)

    # -- how long it takes

    def timed_step(self, step: Step) -> float:
        """Return how many seconds a later step takes."""
        self.begin()
        return timed(lambda: step(self.built.batch), self.device)

    def time_beside_eager(
        self, measured: Measured, step: Step, num_rounds: int, say: Callable[[str], None]
    ) -> None:
        """Fill in times; each round has an eager step and one of `step`, who is first alternates.

        Args:
            measured: where.
            step: trains this model with these optimizers.
            num_rounds: how many times are taken.
            say: told which round runs.
        """
        eager = self.eager_step(self.built.loss_fn)
        seconds: list[float] = []
        eager_seconds: list[float] = []
        for round_index in range(num_rounds):
            say(f"round {round_index + 1}")
            for turn in (round_index, round_index + 1):
                runs, times = (eager, eager_seconds) if turn % 2 == 0 else (step, seconds)
                times.append(self.timed_step(runs))
        ratios = [mine / theirs for mine, theirs in zip(seconds, eager_seconds, strict=True)]
        measured.set_times(seconds, eager_seconds, ratios)


def _inner_tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among values; of those that are made of others, the others."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _inner_tensors(getattr(value, name) for name in names)
        elif isinstance(value, torch.Tensor):
            yield value


def _are_alike(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors agree in types and shapes (in parameters' dtypes they need not).

    What differs in form is nothing that could be compared element by element.
    """
    return len(mine) == len(theirs) and all(
        a.shape == b.shape
        and a.is_floating_point() == b.is_floating_point()
        and not is_traceable_wrapper_subclass(a)
        for a, b in zip(mine, theirs, strict=True)
    )


# -- Packlight's plans


def fit_smallest(
    fit: Callable[[int], packlight.TrainStep], budget_bytes: int, refused_bytes: list[int]
) -> packlight.TrainStep:
    """Fit at a budget that an error named; where that is refused, at the one named then.

    Args:
        fit: budget -> step.
        budget_bytes: the first to try.
        refused_bytes: budgets that were named and refused are added to it.
    """
    while True:
        try:
            return fit(budget_bytes)
        except InfeasibleBudgetError as error:
            refused_bytes.append(budget_bytes)
            if len(refused_bytes) == NUM_SMALLEST_TRIES:
                raise
            budget_bytes = error.smallest_bytes


def smallest_bytes(fit: Callable[[int], packlight.TrainStep]) -> int:
    """Return the smallest budget that an error names."""
    try:
        fit(1)
    except InfeasibleBudgetError as error:
        return error.smallest_bytes
    raise AssertionError("a step that fits into a byte")


def way_digest(way: Way) -> str:
    """Return what is equal where two ways run the same schedules."""
    parts = [(part.num_rows, part.plan.schedule) for part in way.parts]
    text = repr((parts, [part.count for part in way.parts], way.moves))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def accumulated(loss_fn: LossFn, count: int) -> LossFn:
    """Return a loss whose microbatches but the last have had their backward when it returns.

    The loss is a mean over rows, and all microbatches have as many. What is returned has the whole
    batch's loss and the last microbatch's gradients.
    """

    def run(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        total: Any = 0.0
        for index in range(count):
            piece = pytree.tree_map_only(
                torch.Tensor, lambda t, i=index: t.tensor_split(count)[i], batch
            )
            loss = loss_fn(model, piece) / count
            if index < count - 1:
                loss.backward()
                total = total + loss.detach()
        return loss + total

    return run
