"""Time of a forward and backward of one layer over that of the dense layer, interleaved."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import quartiles, timed
from packlight.sparse import SparseWeight
from packlight.sparse.layers import LAYERS
from packlight.sparse.sampling import sample_distinct

CPU = torch.device("cpu")
BATCH = 128

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 1024 x 1024": (lambda: nn.Linear(1024, 1024), (BATCH, 1024)),
    "linear 4096 x 1024": (lambda: nn.Linear(4096, 1024), (BATCH, 4096)),
    "convolution 3 x 3, 64 x 64, 16 x 16": (
        lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (BATCH, 64, 16, 16)
    ),
    "convolution 3 x 3, 128 x 128, 8 x 8": (
        lambda: nn.Conv2d(128, 128, 3, padding=1, bias=False), (BATCH, 128, 8, 8)
    ),
}


def measured(case: str, density: float, num_rounds: int) -> dict[str, Any]:
    """Return the ratio of a step's time to that of the dense layer in the same rounds."""
    make, shape = CASES[case]
    torch.manual_seed(0)
    dense: Any = make()
    count = round(density * dense.weight.numel())
    positions = sample_distinct(count, dense.weight.numel())
    weight = SparseWeight.of_dense(dense.weight, positions)
    sparse = LAYERS[type(dense)].of_dense(copy.deepcopy(dense), weight)
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn_like(dense(x))

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    for layer in (dense, sparse):
        step(layer)
    pairs = [
        (timed(lambda: step(dense), CPU), timed(lambda: step(sparse), CPU))
        for _ in range(num_rounds)
    ]
    ratios = [mine / base for base, mine in pairs]
    return {
        "ratio_median": statistics.median(ratios), "ratio_quartiles": quartiles(ratios),
        "dense_seconds_median": statistics.median([base for base, _ in pairs]),
        "num_rounds": num_rounds, "num_threads": torch.get_num_threads(),
    }
