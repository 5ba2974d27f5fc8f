"""WRN-28-2 on CIFAR-10 (Zagoruyko & Komodakis 2016, arXiv 1605.07146), minibatch 100.

    PACKLIGHT_CIFAR10=path/to/cifar10 packlight train examples/wrn_cifar10.py --budget 150MiB

PACKLIGHT_CIFAR10 names a directory with the data in one of two forms: the Python batches of the
data set's home page (data_batch_1 to data_batch_5, test_batch; also one level down, in
cifar-10-batches-py), or cifar10_full.webp.zip, lossless WebP strips of 500 images with labels.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NUM_CLASSES = 10
NUM_BLOCKS = 4
WIDTHS = (32, 64, 128)
BATCH = 100
LEARNING_RATE = 0.1
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions, each after a batch norm and a ReLU, added to the block's input."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.shortcut = None
        if num_in != num_out:
            self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, num_out, height / stride, width / stride]."""
        active = F.relu(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(active)
        hidden = self.conv1(active)
        return skipped + self.conv2(F.relu(self.norm2(hidden)))


class WideResNet(nn.Module):
    """28 layers deep, twice as wide as the first residual networks for CIFAR: 1,467,610 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = []
        num_in = 16
        for group, width in enumerate(WIDTHS):
            for index in range(NUM_BLOCKS):
                blocks.append(Block(num_in, width, stride=2 if group and not index else 1))
                num_in = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(num_in)
        self.head = nn.Linear(num_in, NUM_CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10] for images [batch, 3, 32, 32]."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean((2, 3)))


def model() -> nn.Module:
    """Return an untrained WRN-28-2."""
    return WideResNet()


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD as in the paper."""
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def batches(split: str = "train") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images float32 [100, 3, 32, 32], labels int64 [100]).

    "train" is endless: shuffled, with mirrored images and shifts of up to 4 pixels. "validation" is
    the test set, once, in order.
    """
    images, labels = read_cifar10(split == "train")
    if split != "train":
        for start in range(0, len(labels), BATCH):
            yield normalized(images[start : start + BATCH]), labels[start : start + BATCH]
        return
    while True:
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield normalized(augmented(images[chosen])), labels[chosen]


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 [batch, 3, 32, 32] images, each shifted, half of them mirrored."""
    padded = F.pad(images, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (len(images), 2)).tolist()
    crops = [padded[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(shifts)]
    shifted = torch.stack(crops)
    is_mirrored = torch.rand(len(images)) < 0.5
    shifted[is_mirrored] = shifted[is_mirrored].flip(3)
    return shifted


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Return float32 images of zero mean and unit deviation per channel for uint8 ones."""
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return (images.float() / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


@cache
def read_cifar10(is_train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (images uint8 [N, 3, 32, 32], labels int64 [N]) from the directory PACKLIGHT_CIFAR10.

    Raises:
        FileNotFoundError: the variable is not set, or the directory holds neither form of the data.
    """
    variable = os.environ.get("PACKLIGHT_CIFAR10")
    if not variable:
        raise FileNotFoundError(
            "set PACKLIGHT_CIFAR10 to the directory that holds CIFAR-10 "
            "(data_batch_1 ... test_batch, or cifar10_full.webp.zip)"
        )
    strips = Path(variable) / "cifar10_full.webp.zip"
    if strips.is_file():
        return _read_strips(strips, "train" if is_train else "test")
    names = [f"data_batch_{i}" for i in range(1, 6)] if is_train else ["test_batch"]
    for directory in (Path(variable), Path(variable) / "cifar-10-batches-py"):
        if all((directory / name).is_file() for name in names):
            return _read_batches([directory / name for name in names])
    raise FileNotFoundError(
        f"{variable} (PACKLIGHT_CIFAR10) has neither {names[0]} nor cifar10_full.webp.zip"
    )


def _read_strips(archive: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        from packlight.errors import MissingExtraError

        raise MissingExtraError("pillow", "vision", "reading WebP strips") from error
    strips = []
    with zipfile.ZipFile(archive) as file:
        labels = np.load(io.BytesIO(file.read(f"{split}_labels.npy")))
        for name in sorted(file.namelist()):
            if name.startswith(f"{split}_images_"):
                with Image.open(io.BytesIO(file.read(name))) as strip:
                    # Images stand one below the other.
                    strips.append(np.asarray(strip.convert("RGB")).reshape(-1, 32, 32, 3))
    images = torch.from_numpy(np.concatenate(strips)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def _read_batches(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = [], []
    for path in paths:
        with path.open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        images.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[b"labels"], dtype=np.int64))
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
