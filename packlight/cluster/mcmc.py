"""How each operation of an irregular graph is split over devices: FlexFlow's search.

Jia, Zaharia and Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks", MLSys 2019.
Each operation has ways to be split: along samples, along space, along filters, on any devices. A
strategy picks one for each. Its time is that of the tasks that result (`strategy_seconds`), and
strategies are sampled by Metropolis and Hastings: another way for a random operation is taken if it
is faster, or else with probability exp(-(time - time')/temperature). Small graphs are enumerated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from packlight.cluster.devices import Cluster
from packlight.cluster.kernels import matmul_seconds


@dataclass(frozen=True, slots=True)
class Split:
    """One way to run an operation.

    Attributes:
        devices: where its equal parts are.
        seconds: of each part.
        exchange_seconds: of its parts among each other: halos, gradients of shared parameters.
        along: which dimension is cut, for reports.
    """

    devices: tuple[int, ...]
    seconds: float
    exchange_seconds: float = 0.0
    along: str = ""


@dataclass(frozen=True)
class SplitOperation:
    """An operation, what it reads, and the ways to split it.

    Attributes:
        name: for reports.
        reads: earlier operations, by index.
        output_bytes: of the whole result.
        splits: ways to run it.
    """

    name: str
    reads: tuple[int, ...]
    output_bytes: float
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class Strategy:
    """A way for each operation.

    Attributes:
        picks: indices of splits.
        seconds: of the step.
        bound_seconds: no strategy is faster.
        is_optimal: all of them were looked at, or the bound is met.
        num_evaluated: how many were.
    """

    picks: tuple[int, ...]
    seconds: float
    bound_seconds: float
    is_optimal: bool
    num_evaluated: int = field(compare=False, default=0)


def strategy_seconds(
    operations: Sequence[SplitOperation], picks: Sequence[int], bytes_per_second: float
) -> float:
    """Return when the last part of the last operation is done.

    Devices work through their parts in the order of the operations. A part reads its share of what
    it needs: what is on its own device is free, the rest crosses the network, one message after
    the other into each device.
    """
    free: dict[int, float] = {}
    incoming: dict[int, float] = {}
    done: list[dict[int, float]] = []
    for operation, pick in zip(operations, picks, strict=True):
        split = operation.splits[pick]
        ready = dict.fromkeys(split.devices, 0.0)
        for source in operation.reads:
            made = operations[source].splits[picks[source]]
            share = operations[source].output_bytes / len(split.devices)
            latest = max(done[source].values())
            aligned = made.devices == split.devices and made.along == split.along
            for device in split.devices:
                if aligned:
                    ready[device] = max(ready[device], done[source][device])
                    continue
                here = 1 / len(made.devices) if device in done[source] else 0.0
                start = max(latest, incoming.get(device, 0.0))
                end = start + share * (1 - here) / bytes_per_second
                incoming[device] = end if here < 1 else incoming.get(device, 0.0)
                ready[device] = max(ready[device], end)
        ends = {}
        for device in split.devices:
            start = max(ready[device], free.get(device, 0.0))
            ends[device] = free[device] = start + split.seconds
        if split.exchange_seconds:
            together = max(ends.values()) + split.exchange_seconds
            ends = dict.fromkeys(ends, together)
        done.append(ends)
    return max(max(ends.values()) for ends in done)


def bound_seconds(operations: Sequence[SplitOperation]) -> float:
    """Return what no strategy undercuts: the longest path, and all work on all devices."""
    longest: list[float] = []
    work = 0.0
    devices: set[int] = set()
    for operation in operations:
        fastest = min(split.seconds for split in operation.splits)
        longest.append(max((longest[i] for i in operation.reads), default=0.0) + fastest)
        work += min(split.seconds * len(split.devices) for split in operation.splits)
        devices.update(device for split in operation.splits for device in split.devices)
    return max(max(longest), work / len(devices))


def search(
    operations: Sequence[SplitOperation],
    bytes_per_second: float,
    *,
    num_samples: int = 2000,
    enumerate_up_to: int = 2000,
    seed: int = 0,
) -> Strategy:
    """Return the fastest strategy found.

    Args:
        operations: in an order in which each comes behind what it reads.
        bytes_per_second: into each device.
        num_samples: how many strategies are sampled, from two starts: all in their first way, and
            each in the way that is fastest alone.
        enumerate_up_to: with fewer strategies than that, all are looked at.
        seed: of the samples.
    """
    bound = bound_seconds(operations)
    ways = [range(len(operation.splits)) for operation in operations]

    def seconds(picks: Sequence[int]) -> float:
        return strategy_seconds(operations, picks, bytes_per_second)

    if math.prod(len(each) for each in ways) <= enumerate_up_to:
        best = min((seconds(picks), picks) for picks in product(*ways))
        return Strategy(best[1], best[0], bound, True, math.prod(map(len, ways)))
    generator = random.Random(seed)
    alone = [
        min(range(len(o.splits)), key=lambda i: o.splits[i].seconds + o.splits[i].exchange_seconds)
        for o in operations
    ]
    found: list[tuple[float, tuple[int, ...]]] = []
    for start in ([0] * len(operations), alone):
        picks, now = list(start), seconds(start)
        found.append((now, tuple(picks)))
        for step in range(num_samples // 2):
            # From a tenth of the time down to nothing: early on slower ones are taken, too.
            temperature = 0.1 * now * (1 - step / (num_samples // 2)) + 1e-12
            index = generator.randrange(len(operations))
            before, picks[index] = picks[index], generator.choice(ways[index])
            then = seconds(picks)
            if then <= now or generator.random() < math.exp((now - then) / temperature):
                now = then
                found.append((now, tuple(picks)))
            else:
                picks[index] = before
    best = min(found)
    return Strategy(best[1], best[0], bound, best[0] <= bound * (1 + 1e-9), num_samples + 2)


def convolution_splits(
    cluster: Cluster,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: int,
    degrees: Sequence[int] = (1, 2, 4, 8),
) -> tuple[Split, ...]:
    """Return a convolution's splits along samples, height and filters, on a node's first devices.

    Samples and height share the parameters, whose gradients are added up; cut along the height,
    neighbours exchange the kernel's halo; cut along filters, each device computes gradients of the
    whole input, which are added up.

    Args:
        cluster: GPUs and the link between them.
        batch: samples.
        channels: of input and output.
        size: height and width.
        kernel: its height and width.
        degrees: into how many parts.
    """
    (into, out), (height, width) = channels, size
    rate = cluster.node_link.rate
    parameters = 2 * into * out * kernel**2
    inputs = 2 * batch * into * height * width

    def seconds(samples: int, rows: int, filters: int) -> float:
        pixels = max(samples, 1) * max(rows, 1) * width
        return 3 * matmul_seconds(cluster.gpu, pixels, max(filters, 1), into * kernel**2)

    splits = []
    for n in degrees:
        devices = tuple(range(n))
        if n == 1:
            splits.append(Split(devices, seconds(batch, height, out), 0.0, "nothing"))
            continue
        ring = 2 * (n - 1) / n / rate
        if batch % n == 0:
            splits.append(Split(
                devices, seconds(batch // n, height, out), ring * parameters, "samples"
            ))
        if height % n == 0:
            halo = 2 * 2 * (kernel // 2) * 2 * batch * into * width / rate
            splits.append(Split(
                devices, seconds(batch, height // n, out), ring * parameters + halo, "height"
            ))
        if out % n == 0:
            splits.append(Split(
                devices, seconds(batch, height, out // n), ring * inputs, "filters"
            ))
    return tuple(splits)
