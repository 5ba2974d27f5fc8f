"""One training step, eager's or Packlight's: what it computes, holds and takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.common import quartiles, same_bits, timed, whole_peak
from benchmarks.spine.cases import Built
from benchmarks.spine.peers import LossFn, per_block
from benchmarks.whole_step.cases import Case
from benchmarks.whole_step.records import Record

NUM_VALIDATION_BATCHES = 20
QUICK_TRAINED_STEPS = 3

Step = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """What eager PyTorch's first step computes.

    Attributes:
        loss: the first.
        results: "parameters", and the optimizer's state by its name, after the step.
    """

    loss: torch.Tensor
    results: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Training:
    """A training run: the loss of every step, and the mean loss of validation batches after it."""

    losses: list[float]
    validation_loss: float


class Workbench:
    """One model and one optimizer, which every step trains: eager's and Packlight's.

    Args:
        case: which model.
        quick: small sizes.
        seed: of model, batch and dropout.
        say: told what runs.
    """

    def __init__(
        self, case: Case, quick: bool, device: str, seed: int, say: Callable[[str], None]
    ) -> None:
        self.case, self.quick, self.seed, self.say = case, quick, seed, say
        self.device = torch.device(device)
        self.built: Built = case.build(quick, device, seed)
        self.optimizer = case.optimizer(self.built.model)
        self.parameters = list(self.built.model.parameters())
        self._eager_reference: Reference | None = None
        self._eager_training: Training | None = None

    def eager_step(self, loss_fn: LossFn) -> Step:
        """Return the plain step; `loss_fn` may call `backward` for all but the last microbatch."""

        def step(batch: Any) -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(self.built.model, batch)
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        return step

    def by_hand(self) -> dict[str, LossFn]:
        """Return what a user would do without Packlight."""
        found: dict[str, LossFn] = {}
        count = self.case.microbatches_by_hand
        if self.built.blocks:
            found["by hand: checkpoint per block"] = per_block(self.built)
        if count > 1:
            found[f"by hand: {count} microbatches"] = accumulated(self.built.loss_fn, count)
        if self.built.blocks and count > 1:
            found["by hand: both"] = accumulated(per_block(self.built), count)
        return found

    def begin(self, is_first: bool = False) -> None:
        """Set weights, statistics and generators to where the first step found them.

        Args:
            is_first: forget the optimizer's state, too.
        """
        self.built.model.load_state_dict(self.built.initial)
        self.optimizer.zero_grad(set_to_none=True)
        if is_first:
            self.optimizer.state.clear()
        torch.manual_seed(self.seed + 1)

    # -- one cell

    def measure(self, record: Record, step: Step, num_rounds: int) -> None:
        """Fill in peaks, what the first step computes, and times beside eager steps."""
        eager = self.eager_step(self.built.loss_fn)
        reference = self._reference()
        self.begin(is_first=True)
        loss, record.first_peak_bytes = self._peak_of(step)
        self._compare(record, loss, reference)
        self.begin()
        _, record.later_peak_bytes = self._peak_of(step)
        seconds, eager_seconds = [], []
        for round_index in range(num_rounds):
            self.say(f"{record.setting} {record.variant}, round {round_index + 1}")
            # Who goes first alternates.
            for turn in (round_index, round_index + 1):
                self.begin()
                runs, times = (eager, eager_seconds) if turn % 2 == 0 else (step, seconds)
                times.append(timed(lambda run=runs: run(self.built.batch), self.device))
        ratios = [mine / theirs for mine, theirs in zip(seconds, eager_seconds, strict=True)]
        record.num_rounds = len(ratios)
        record.seconds_median = statistics.median(seconds)
        record.eager_seconds_median = statistics.median(eager_seconds)
        record.ratio_median, record.ratio_quartiles = statistics.median(ratios), quartiles(ratios)

    def _peak_of(self, step: Step) -> tuple[torch.Tensor, int]:
        """Run a step; return its loss and its whole peak: what was there and what it added."""
        peak = whole_peak(step, self.built.model, self.optimizer, self.built.batch)
        return peak.result, peak.peak_bytes

    def _reference(self) -> Reference:
        if self._eager_reference is None:
            self.begin(is_first=True)
            loss = self.eager_step(self.built.loss_fn)(self.built.batch)
            copies = {name: [t.clone() for t in found] for name, found in self._results().items()}
            self._eager_reference = Reference(loss, copies)
        return self._eager_reference

    def _results(self) -> dict[str, list[torch.Tensor]]:
        """Return what a step has written."""
        found = {"parameters": [p.detach() for p in self.parameters]}
        for p in self.parameters:
            for name, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    found.setdefault(name, []).append(value)
        return found

    def _compare(self, record: Record, loss: torch.Tensor, reference: Reference) -> None:
        results = self._results()
        record.loss_difference = float((loss - reference.loss).abs() / reference.loss.abs())
        record.same_bits = {"loss": same_bits(loss, reference.loss)}
        names = [name for name, _ in self.built.model.named_parameters()]
        errors = []
        for kind, theirs in reference.results.items():
            mine = results[kind]
            record.same_bits[kind] = all(map(same_bits, mine, theirs))
            starts: list[Any] = [0.0] * len(theirs)
            if kind == "parameters":  # the update counts, not what was there before
                starts = [self.built.initial[name] for name in names]
            off = sum(_square(a - b) for a, b in zip(mine, theirs, strict=True))
            total = sum(_square(a - b) for a, b in zip(theirs, starts, strict=True))
            errors.append((off / total) ** 0.5 if total else 0.0)
        record.update_error = max(errors)

    # -- training runs

    def compare_training(self, record: Record, step: Step) -> None:
        """Fill in what a training run comes to, beside eager's on the same batches."""
        if self._eager_training is None:
            eager = self.eager_step(self.built.loss_fn)
            self._eager_training = self._train(eager, "training eager")
        mine = self._train(step, f"training at {record.setting}")
        theirs = self._eager_training
        record.num_trained_steps = len(mine.losses)
        record.validation_loss = mine.validation_loss
        record.eager_validation_loss = theirs.validation_loss
        record.training_loss_difference = max(
            abs(a - b) / abs(b) for a, b in zip(mine.losses, theirs.losses, strict=True)
        )

    def _train(self, step: Step, what: str) -> Training:
        case, device, model = self.case, str(self.device), self.built.model
        num_steps = QUICK_TRAINED_STEPS if self.quick else case.num_trained_steps
        batches = list(case.batches("train", num_steps, device, self.seed + 2))
        self.begin(is_first=True)
        losses = []
        for index, batch in enumerate(batches):
            if index % 10 == 0:
                self.say(f"{what}, step {index} of {len(batches)}")
            losses.append(float(step(batch)))
        held_out = case.batches("validation", NUM_VALIDATION_BATCHES, device, self.seed + 3)
        model.eval()
        with torch.no_grad():
            values = [float(self.built.loss_fn(model, batch)) for batch in held_out]
        model.train()
        return Training(losses, statistics.fmean(values))


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


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
