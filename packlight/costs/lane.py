"""How fast a far memory takes buffers and gives them back, measured as the step will use it."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from packlight.memory.disk import DiskTier
from packlight.memory.host import HostTier
from packlight.memory.tier import SlotSpec, Tier
from packlight.step import Lane, Speed

_SMALL_BYTES = 4096
_NUM_ROUNDS = 3
_ALONE_SECONDS = 0.02
_CPU = torch.device("cpu")
_measured: dict[tuple[object, ...], Lane] = {}


def measure_lane(
    directory: str | os.PathLike[str] | None,
    num_bytes: int = 64 * 2**20,
    device: torch.device = _CPU,
    *,
    while_computing: bool = True,
    allow_memory: bool = False,
) -> Lane:
    """Return the lane to a directory's disk, or to the host's memory: medians of three rounds.

    A transfer to a disk has to share the cores with the step, so by default this thread multiplies
    matrices meanwhile, with as many threads as torch is set to use. The first round is dropped: a
    file's first writes cost more than those of later steps. A GPU's copies take no cores.

    Args:
        directory: where the tier's file would be; `2 * num_bytes` are reserved there meanwhile.
            None for pinned memory of the host.
        num_bytes: of each of the two buffers that are sent and fetched.
        device: where buffers come from.
        while_computing: False measures the disk with idle cores.
        allow_memory: see `DiskTier`.

    Returns:
        A lane with both directions' speeds and what transfers take from computing. What was
        measured for a memory is remembered until the process ends.

    Raises:
        OffloadError: see `DiskTier` and `HostTier`.
    """
    name = "host memory" if directory is None else str(Path(directory).resolve())
    while_computing = while_computing and device.type == "cpu"
    key = (name, num_bytes, device, torch.get_num_threads(), while_computing)
    if key not in _measured:
        large = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        small = torch.zeros(_SMALL_BYTES, dtype=torch.uint8, device=device)
        slots = [SlotSpec.of(large), SlotSpec.of(large), SlotSpec.of(small)]
        tier = (
            HostTier(slots)
            if directory is None
            else DiskTier(name, slots, allow_memory=allow_memory)
        )
        with tier:
            _measured[key] = _measure(tier, name, large, small, while_computing)
    return _measured[key]


def _measure(
    tier: Tier, name: str, large: torch.Tensor, small: torch.Tensor, while_computing: bool
) -> Lane:
    writes, reads, latencies, shares = [], [], [], []
    rate = products_per_second() if while_computing else math.inf

    def write_large() -> None:
        tier.offload(0, large)
        tier.offload(1, large)

    def read_large() -> list[torch.Tensor]:
        return [tier.fetch(0), tier.fetch(1)]

    def timed(start: Callable[[], object]) -> float:
        seconds, num_products = _run(tier, start, while_computing)
        shares.append(1 - num_products / (rate * seconds))
        return seconds

    for _ in range(1 + _NUM_ROUNDS):
        writes.append(timed(write_large))
        reads.append(timed(read_large))
        latencies.append(_run(tier, lambda: tier.offload(2, small), while_computing)[0])
        latencies.append(_run(tier, lambda: tier.fetch(2), while_computing)[0])
    latency = statistics.median(latencies[2:])
    write, read = (
        2 * large.nbytes / max(statistics.median(seconds[1:]) - latency, 1e-9)
        for seconds in (writes, reads)
    )
    share = min(max(statistics.median(shares[2:]), 0.0), 1.0) if while_computing else 0.0
    return Lane(name, name, Speed(read, latency), Speed(write, latency), share)


def _run(
    tier: Tier, start: Callable[[], object], while_computing: bool
) -> tuple[float, int]:
    """Return how long the transfers that `start` asks for take, and products made meanwhile."""
    product = products()
    num_products = 0
    begin = time.perf_counter()
    kept = start()
    while while_computing and not tier.is_idle():
        product()
        num_products += 1
    tier.wait_all()
    if tier.slots[0].device.type != "cpu":  # which only its stream has waited for
        torch.cuda.synchronize(tier.slots[0].device)
    seconds = time.perf_counter() - begin
    del kept
    return seconds, num_products


def products() -> Callable[[], object]:
    """Return what computes for a moment, as a step does while lanes work."""
    matrix, product = torch.ones(256, 256), torch.empty(256, 256)
    return lambda: torch.mm(matrix, matrix, out=product)


def products_per_second() -> float:
    """Return how many products of matrices this thread makes when nothing is transferred."""
    product = products()
    rates = []
    for _ in range(_NUM_ROUNDS):
        begin, num_products = time.perf_counter(), 0
        while time.perf_counter() - begin < _ALONE_SECONDS:
            product()
            num_products += 1
        rates.append(num_products / (time.perf_counter() - begin))
    return statistics.median(rates)
