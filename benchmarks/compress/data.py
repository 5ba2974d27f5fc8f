"""MNIST in memory, and batches of it, distorted or not."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

VARIABLE = "PACKLIGHT_MNIST"
MEAN, DEVIATION = 0.1307, 0.3081


@dataclass(frozen=True)
class Digits:
    """A set of digits.

    Attributes:
        images: float32 [N, 1, 28, 28], mean 0 and deviation 1 over the training set.
        labels: int64 [N].
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def mnist_directory() -> Path:
    """Return the directory with MNIST's four gzipped files, which an environment variable names."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        raise SystemExit(f"set {VARIABLE} to the directory that holds MNIST's four .gz files")
    return Path(directory)


@cache
def mnist(split: str) -> Digits:
    """Return the "train" (60,000) or the "test" set (10,000)."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _idx(mnist_directory() / f"{prefix}-images-idx3-ubyte.gz")
    labels = _idx(mnist_directory() / f"{prefix}-labels-idx1-ubyte.gz")
    scaled = (images[:, None].float() / 255 - MEAN) / DEVIATION
    return Digits(scaled, labels.long())


def _idx(path: Path) -> torch.Tensor:
    with gzip.open(path) as file:
        content = file.read()
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    values = torch.frombuffer(bytearray(content[4 + 4 * len(sizes) :]), dtype=torch.uint8)
    return values.reshape(sizes)


def batches(
    digits: Digits, size: int, generator: torch.Generator, *, distorted: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch of shuffled batches, without the last, partial one."""
    order = torch.randperm(len(digits), generator=generator)
    for begin in range(0, len(digits) - size + 1, size):
        rows = order[begin : begin + size]
        images = digits.images[rows]
        yield (distort(images, generator) if distorted else images), digits.labels[rows]


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images turned by up to 12 degrees, scaled, sheared, shifted by up to 2 pixels."""

    def uniform(reach: float) -> torch.Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * reach

    angle, shear = uniform(math.radians(12)), uniform(0.15)
    wide, high = 1 + uniform(0.12), 1 + uniform(0.12)
    shift_x, shift_y = uniform(4 / 28), uniform(4 / 28)
    cos, sin = angle.cos(), angle.sin()
    maps = torch.stack([
        torch.stack([cos * wide, shear - sin * high, shift_x], dim=1),
        torch.stack([sin * wide, cos * high, shift_y], dim=1),
    ], dim=1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    background = -MEAN / DEVIATION
    moved = F.grid_sample(images - background, grid, align_corners=False)
    return moved + background
