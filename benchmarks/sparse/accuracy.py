"""LeNet-300-100 on MNIST, trained with each method on the same batches."""

from __future__ import annotations

import gzip
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import packlight
from packlight.sparse import (
    DSR,
    SET,
    DeepR,
    GradualPruning,
    GuidedExploration,
    Method,
    RigL,
    Static,
    Thin,
)

BATCH = 100
LEARNING_RATE = 0.1
# Where the four files of MNIST are.
FOLDER = "PACKLIGHT_MNIST"


def methods(num_steps: int) -> dict[str, Method]:
    """Return the methods with their settings for a run of so many steps."""
    every, until = max(1, num_steps // 20), 3 * num_steps // 4
    return {
        "dsr": DSR(every=every, until=until), "set": SET(every=every, until=until),
        "deepr": DeepR(), "rigl": RigL(every=every, until=until),
        "gse": GuidedExploration(every=every, until=until), "static": Static(), "thin": Thin(),
        "pruning": GradualPruning(every=every, until=until),
    }


def measured(method: str, density: float, seed: int, num_steps: int) -> dict[str, Any]:
    """Return the test accuracy of a run, in percent, and what it held.

    SGD with Nesterov momentum 0.9 and weight decay 1e-4; the learning rate falls in a cosine. The
    last layer stays dense.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )
    sparsity = None
    if method != "dense":
        chosen = methods(num_steps)[method]
        sparsity = packlight.sparsify(model, density, chosen, exclude=["5"], seed=seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    if sparsity is not None:
        sparsity.attach(optimizer)
    images, labels = _mnist("train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(num_steps):
        if len(order) < BATCH:
            order = torch.randperm(len(labels), generator=generator)
        chosen_rows, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / num_steps)) / 2
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen_rows]), labels[chosen_rows])
        loss.backward()
        optimizer.step()
    images, labels = _mnist("t10k")
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    values = {"accuracy_percent": 100 * right / len(labels), "num_steps": num_steps}
    if sparsity is not None:
        values |= {"num_nonzeros": sparsity.num_nonzeros, **{
            f"density_{name}": weight.num_nonzeros / weight.numel()
            for name, weight in sparsity.weights.items()
        }}
    return values


@cache
def _mnist(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, of mean 0 and deviation 1, and labels."""
    if FOLDER not in os.environ:
        raise SystemExit(f"{FOLDER} does not say where the files of MNIST are")
    folder = Path(os.environ[FOLDER])
    images = _read(folder / f"{split}-images-idx3-ubyte.gz").float()
    labels = _read(folder / f"{split}-labels-idx1-ubyte.gz")
    return ((images / 255 - 0.1307) / 0.3081).unsqueeze(1), labels.long()


def _read(path: Path) -> torch.Tensor:
    content = gzip.decompress(path.read_bytes())
    num_dims = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    return torch.from_numpy(array.copy())
