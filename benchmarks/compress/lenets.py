"""The two networks of the literature, and how they are trained here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.compress.data import Digits, batches

CONVOLUTIONS_FASTER_IN = torch.channels_last


def lenet_300_100() -> nn.Module:
    """Return LeNet-300-100: 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet_5(first: int = 20, second: int = 50, hidden: int = 500) -> nn.Module:
    """Return Caffe's LeNet-5, which has 431,080 parameters, or one with fewer channels."""
    return nn.Sequential(
        nn.Conv2d(1, first, 5), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * 16, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    ).to(memory_format=CONVOLUTIONS_FASTER_IN)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; Adam, and a learning rate that falls to 0 in a cosine.

    Attributes:
        num_epochs: over all of the data.
        learning_rate: after the first 2% of the steps.
        batch: images in one step.
        weight_decay: decoupled.
        distorted: whether each image is moved a little each time it is seen.
        from_teacher: share of the loss that is the divergence from a teacher's answers.
        temperature: of those answers.
    """

    num_epochs: int
    learning_rate: float = 2e-3
    batch: int = 128
    weight_decay: float = 0.0
    distorted: bool = False
    from_teacher: float = 0.0
    temperature: float = 3.0

    def loss(
        self, answers: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None
    ) -> torch.Tensor:
        """Return cross entropy, mixed with the divergence from a teacher (Hinton et al. 2015)."""
        loss = F.cross_entropy(answers, labels)
        if taught is None:
            return loss
        t = self.temperature
        divergence = F.kl_div(
            (answers / t).log_softmax(1), (taught / t).softmax(1), reduction="batchmean"
        )
        return (1 - self.from_teacher) * loss + self.from_teacher * t * t * divergence


def train(
    model: nn.Module,
    digits: Digits,
    recipe: Recipe,
    seed: int,
    *,
    teacher: nn.Module | None = None,
    on_step: Callable[[float], None] = lambda share_done: None,
    extra_loss: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Train a model.

    Args:
        model: changed.
        digits: to train on.
        recipe: how.
        seed: of order and distortion.
        teacher: whose answers are learnt, if the recipe has a share for it.
        on_step: called before each step with the share of steps that are done.
        extra_loss: what is added to the loss of a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    num_steps = recipe.num_epochs * (len(digits) // recipe.batch)
    step = 0
    model.train()
    for _ in range(recipe.num_epochs):
        for images, labels in batches(
            digits, recipe.batch, generator, distorted=recipe.distorted
        ):
            share_done = step / num_steps
            rate = min(1.0, 50 * share_done) * 0.5 * (1 + math.cos(math.pi * share_done))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            on_step(share_done)
            taught = None
            if teacher is not None and recipe.from_teacher:
                with torch.no_grad():
                    taught = teacher(images)
            loss = recipe.loss(model(images), labels, taught)
            if extra_loss is not None:
                loss = loss + extra_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()


@torch.no_grad()
def error_percent(model: nn.Module, digits: Digits) -> float:
    """Return how many answers in a hundred are wrong."""
    model.eval()
    wrong = sum(
        int((model(images).argmax(1) != labels).sum())
        for images, labels in zip(
            digits.images.split(2500), digits.labels.split(2500), strict=True
        )
    )
    return 100 * wrong / len(digits)
