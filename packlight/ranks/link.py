"""How fast ranks add up what they have: latency, bytes per second, and computation lost meanwhile.

All ranks measure at once, as all of them send at once in a step, and the slowest counts. What
disturbs a reduction only ever adds to its time: the least of several counts. What was seen is
remembered on disk by rank 0, for the same number of ranks on the same machines.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence

import torch

from packlight.costs.cache import Cache
from packlight.costs.lane import products, products_per_second
from packlight.ranks.group import Ranks
from packlight.step import Lane, Speed

NETWORK = "network"
SMALL_BYTES, LARGE_BYTES = 4, 4 * 2**20
NUM_ROUNDS = 8


def measure_link(ranks: Ranks, device: torch.device) -> Lane:
    """Return the lane on which these ranks reduce; the same on all of them.

    Raises:
        RankError: another rank failed meanwhile, or is gone.
    """
    hosts = ranks.gather(socket.gethostname)
    cache = Cache("links", device)
    key = f"all-reduce, {ranks.size} ranks on {[hosts.count(h) for h in dict.fromkeys(hosts)]}"
    known = ranks.broadcast(cache[key] if key in cache else None, 0)
    if not _is_whole(known):
        mine = _measured(ranks, device)
        everybody = ranks.gather(lambda: mine)
        known = [max(same) for same in zip(*everybody, strict=True)]
        if ranks.rank == 0:
            cache[key] = known
            cache.save()
    assert known is not None
    latency, per_byte, share = known
    return Lane(
        NETWORK, "", None, None, compute_share=share, reduce=Speed(1 / per_byte, latency)
    )


def _is_whole(known: object) -> bool:
    return (
        isinstance(known, Sequence) and len(known) == 3
        and all(isinstance(value, float) for value in known) and known[1] > 0
    )


def _measured(ranks: Ranks, device: torch.device) -> list[float]:
    """Return seconds of latency, seconds per byte, and the share of computation that is lost."""
    small = torch.zeros(SMALL_BYTES // 4, device=device)
    large = torch.zeros(LARGE_BYTES // 4, device=device)
    is_shared = device.type == "cpu"  # a GPU's network takes none of what computes
    rate = products_per_second() if is_shared else 0.0
    latencies, seconds, shares = [], [], []
    for _ in range(1 + NUM_ROUNDS):  # the first round connects
        latencies.append(_reduce(ranks, small, computes=False)[0])
        took, num_products = _reduce(ranks, large, computes=is_shared)
        seconds.append(took)
        shares.append(1 - num_products / (rate * took) if is_shared else 0.0)
    latency = min(latencies[1:])
    per_byte = max(min(seconds[1:]) - latency, 1e-9) / LARGE_BYTES
    return [latency, per_byte, min(max(statistics.median(shares[1:]), 0.0), 1.0)]


def _reduce(ranks: Ranks, tensor: torch.Tensor, computes: bool) -> tuple[float, int]:
    """Return how long a reduction takes that all ranks start at once, and products meanwhile."""
    ranks.exchange(0)
    product, num_products = products(), 0
    start = time.perf_counter()
    sent = ranks.start(tensor)
    while computes and not sent.work.is_completed():
        product()
        num_products += 1
    ranks.wait(sent)
    if tensor.device.type != "cpu":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start, num_products
