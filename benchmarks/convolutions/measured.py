"""One model on a number of ranks: its peak, what ranks send one another, its seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.common import append_line, mebibytes
from packlight import measure_peak
from packlight.convolution import Spatial, SplitModel, parallelize_convolutions
from packlight.ranks.peers import Peers

WIDTH, NUM_CLASSES = 16, 8


@dataclass
class Record:
    """One model on a number of ranks.

    Attributes:
        model: its name.
        num_ranks: over which rows are cut; 1 for plain PyTorch.
        peak_bytes: of forward and backward above parameters, batch and gradients, of the rank with
            most.
        halo_bytes: that came to the ranks from one another in a step, counted.
        formula_bytes: computed.
        step_seconds: median, of forward and backward.
        loss: the mean of the ranks' losses.
        provenance: where, when and with what.
    """

    model: str
    num_ranks: int
    peak_bytes: int
    halo_bytes: int
    formula_bytes: int
    step_seconds: float
    loss: float
    provenance: dict[str, Any] = field(default_factory=dict)


def block(channels: int, out_channels: int) -> nn.Sequential:
    """Return two convolutions, each normalised."""
    layers: list[nn.Module] = []
    for c in (channels, out_channels):
        layers += [
            nn.Conv2d(c, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels, one class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([block(3, WIDTH), block(WIDTH, 2 * WIDTH)])
        self.middle = block(2 * WIDTH, 4 * WIDTH)
        self.ups = nn.ModuleList(
            [nn.ConvTranspose2d(2 * c, c, 2, 2) for c in (2 * WIDTH, WIDTH)]
        )
        self.joins = nn.ModuleList([block(4 * WIDTH, 2 * WIDTH), block(2 * WIDTH, WIDTH)])
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(WIDTH, NUM_CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits for each pixel."""
        kept = []
        for down in self.downs:
            kept.append(down(x))
            x = self.pool(kept[-1])
        x = self.middle(x)
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


class ConvNet(nn.Module):
    """A stem, blocks with strides and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, WIDTH, 7, 2, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            block(WIDTH, 2 * WIDTH), nn.AvgPool2d(2), block(2 * WIDTH, 4 * WIDTH),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4 * WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


# With the rows and columns of a sample.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "U-Net": (UNet, 256), "ConvNet": (ConvNet, 512)
}


def measure_rank(
    rank: int, num_ranks: int, folder: str, steps: int, out: Path, told: dict[str, Any]
) -> None:
    """Measure all models as one of several ranks; the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    for name in MODELS:
        record = _measured(name, num_ranks, steps)
        record.provenance = told
        if rank == 0:
            append_line(out, record)
            print(f"{name} on {num_ranks}: {mebibytes(record.peak_bytes)} MiB", flush=True)
    dist.destroy_process_group()


def _measured(name: str, num_ranks: int, steps: int) -> Record:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(1, 3, size, size)
    y = torch.randint(NUM_CLASSES, (1, size, size) if name == "U-Net" else (1,))
    formula = 0
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("rows",))
        split = parallelize_convolutions(model, mesh, Spatial(2), x)
        x = split.part(x)
        y = split.part(y, channels=False) if split.is_cut_after else y
        formula = halo_bytes(split)

    def step() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    step()  # gradients are there from now on
    with counted_bytes() as counted:
        measured = measure_peak(step)
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    numbers = torch.tensor([counted[0], formula, float(measured.result)], dtype=torch.float64)
    peak = torch.tensor(measured.peak_bytes)
    dist.all_reduce(numbers)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return Record(
        name, num_ranks, int(peak), int(numbers[0]), int(numbers[1]), statistics.median(seconds),
        float(numbers[2]) / num_ranks,
    )


def halo_bytes(split: SplitModel) -> int:
    """Return the bytes of rows that come to this rank in a step, by the table.

    What comes in the forward goes back in the backward, but for the first layer's: the sample needs
    no gradient.
    """
    total = 0
    for place, layer in enumerate(split.layers):
        for axis, rows in zip(split.axes, layer.rows, strict=False):
            row_elements = prod(layer.shape) // layer.shape[axis.dim]
            num_ways = 1 if place == 0 else 2
            total += num_ways * 4 * row_elements * rows.map.num_received(axis.peers.rank)
    return total


class counted_bytes:  # noqa: N801
    """Counts bytes that this rank hands to the network for other ranks."""

    def __enter__(self) -> list[int]:
        self.before, count = Peers.start_exchange, [0]

        def start_exchange(
            peers: Peers, received: torch.Tensor, sent: torch.Tensor, come: list[int],
            gone: list[int],
        ) -> Any:
            count[0] += sent.nbytes
            return self.before(peers, received, sent, come, gone)

        Peers.start_exchange = start_exchange  # type: ignore[method-assign]
        return count

    def __exit__(self, *_: Any) -> None:
        Peers.start_exchange = self.before  # type: ignore[method-assign]
