"""Larger batches: which learning rate goes with them, how to get there, how large to make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt

import torch

from packlight.errors import OptionError


def scaled_lr(lr: float, batch: int, base_batch: int, scaling: str = "linear") -> float:
    """Return the learning rate of a batch, from that of another one.

    Args:
        lr: of the base batch.
        batch: number of samples.
        base_batch: number of samples with which `lr` was tuned.
        scaling: "linear" in the batch (Goyal et al. 2017, for SGD) or "sqrt" (Krizhevsky 2014; for
            Adam, Malladi et al. 2022).

    Raises:
        OptionError: an unknown scaling, or no samples.

    >>> scaled_lr(0.1, batch=8192, base_batch=256), scaled_lr(1e-3, 4096, 256, "sqrt")
    (3.2, 0.004)
    """
    if batch < 1 or base_batch < 1:
        raise OptionError(f"batch={batch!r}, base_batch={base_batch!r}; both 1 or larger")
    if scaling not in ("linear", "sqrt"):
        raise OptionError(f"unknown scaling={scaling!r}; known: linear, sqrt")
    ratio = batch / base_batch
    return lr * (ratio if scaling == "linear" else sqrt(ratio))


def gradual_warmup(
    optimizer: torch.optim.Optimizer, num_steps: int, first: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a scheduler that raises learning rates linearly (Goyal et al. 2017, section 2.2).

    Args:
        optimizer: with the rates that are reached in the end.
        num_steps: after which they are.
        first: share of them to begin with, such as base_batch / batch.

    Raises:
        OptionError: no steps, or a share outside of 0 to 1.
    """
    if num_steps < 1 or not 0 <= first <= 1:
        raise OptionError(f"num_steps={num_steps!r}, first={first!r}; 1 or more, from 0 to 1")

    def share(step: int) -> float:
        return min(first + (1 - first) * step / num_steps, 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


class NoiseScale:
    """The gradient noise scale (McCandlish et al. 2018, appendix A.1), measured while one trains.

    A step's gradient is an average over parts (ranks, or microbatches) of `part` samples each. The
    squared norms of the parts' gradients and of their average tell the true gradient's, |G|^2, from
    the noise of one sample, S = trace of the covariance:

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b);   S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    Both are averaged over steps, since one step's say little. At a batch of S / |G|^2 half of a
    step is noise: much smaller ones waste no samples, much larger ones waste computation.

    Args:
        part: samples in each part.
        num_parts: in a step, 2 or more.
        decay: of the averages over steps.

    Raises:
        OptionError: fewer than two parts, or a decay outside of its range.

    >>> noise = NoiseScale(part=8, num_parts=4)
    >>> noise.add([torch.tensor([1.0, 2.0])] * 4)
    >>> noise.value()
    0.0
    """

    def __init__(self, part: int, num_parts: int, decay: float = 0.95) -> None:
        if part < 1 or num_parts < 2:
            raise OptionError(
                f"part={part!r}, num_parts={num_parts!r}: noise shows in the differences between "
                "parts of a step, so there must be two or more"
            )
        if not 0 <= decay < 1:
            raise OptionError(f"decay={decay!r}; it must be at least 0 and below 1")
        self.part, self.num_parts, self.decay = part, num_parts, decay
        self._noise = self._slope = 0.0

    def add(self, gradients: Sequence[torch.Tensor | Iterable[torch.Tensor]]) -> None:
        """Take in a step.

        Args:
            gradients: of each part: a tensor, or tensors of all parameters.
        """
        parts = [[g] if isinstance(g, torch.Tensor) else list(g) for g in gradients]
        small = sum(_square(part) for part in parts) / len(parts)
        average = [torch.stack(same).mean(0) for same in zip(*parts, strict=True)]
        self.add_squares(small, _square(average))

    def add_squares(self, of_parts: float, of_average: float) -> None:
        """Take in a step of which norms are known.

        Args:
            of_parts: the mean of the parts' squared norms.
            of_average: the squared norm of the average gradient.
        """
        b, whole = self.part, self.part * self.num_parts
        slope = (whole * of_average - b * of_parts) / (whole - b)
        noise = (of_parts - of_average) / (1 / b - 1 / whole)
        self._slope = self.decay * self._slope + (1 - self.decay) * slope
        self._noise = self.decay * self._noise + (1 - self.decay) * noise

    def value(self) -> float:
        """Return S / |G|^2 in samples: the batch to choose; infinite where all is noise."""
        if self._noise <= 0:
            return 0.0
        return self._noise / self._slope if self._slope > 0 else float("inf")


def _square(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)
