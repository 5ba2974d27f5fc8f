"""What whole-step cells need beside the bench that all share: steps by hand, and training runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.models import LossFn
from benchmarks.peers.checkpointing import per_block
from benchmarks.whole_step.cases import Case
from benchmarks.whole_step.records import Record
from benchmarks.workbench import Step, Workbench, accumulated

NUM_VALIDATION_BATCHES = 20
QUICK_TRAINED_STEPS = 3


@dataclass(frozen=True)
class Training:
    """A training run: the loss of every step, and the mean loss of validation batches after it."""

    losses: list[float]
    validation_loss: float


class TrainingBench(Workbench):
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
        self.case, self.quick, self.say = case, quick, say
        built = case.build(quick, device, seed)
        super().__init__(built, [case.optimizer(built.model)], device, seed)
        self._eager_training: Training | None = None

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

    def measure(self, record: Record, step: Step, num_rounds: int) -> None:
        """Fill in peaks, what the first step computes, and times beside eager steps."""
        self.look_at(record, step)
        name = f"{record.setting} {record.variant}"
        self.time_beside_eager(
            record, step, num_rounds, lambda what: self.say(f"{name}, {what}")
        )

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
