"""How fast ranks add up and gather: latency, bytes per second, and computation lost meanwhile.

All ranks measure at once, as all of them send at once in a step, and the slowest counts. What
disturbs a collective only ever adds to its time: the least of several counts. What was seen is
remembered on disk by rank 0, for the same number of ranks on the same machines; since it may have
been seen beside other work, every process looks again, and the faster one counts.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from packlight.costs.cache import Cache
from packlight.costs.lane import products, products_per_second
from packlight.ranks.group import Ranks, Sent
from packlight.ranks.pieces import Pieces
from packlight.step import RANKS, Lane, Speed

NETWORK = "network"
SMALL_BYTES, LARGE_BYTES = 4, 4 * 2**20
NUM_ROUNDS = 8

# Latency and seconds per byte of each of the kinds of collectives, then what computation loses.
Measured = list[float]


# In this process.
_links: WeakKeyDictionary[Ranks, Lane] = WeakKeyDictionary()


def measure_link(ranks: Ranks, device: torch.device, among: Ranks | None = None) -> Lane:
    """Return the lane on which these ranks reduce and gather; the same on all of them.

    Args:
        ranks: they.
        device: of the model.
        among: all ranks, of which groups like this one measure at once: the slowest group counts.

    Raises:
        RankError: another rank failed meanwhile, or is gone.
    """
    if ranks not in _links:
        _links[ranks] = _looked_at(ranks, device, among or ranks)
    return _links[ranks]


def _looked_at(ranks: Ranks, device: torch.device, among: Ranks) -> Lane:
    hosts = ranks.gather(socket.gethostname)
    cache = Cache("links", device)
    key = f"collectives, {ranks.size} ranks on {[hosts.count(h) for h in dict.fromkeys(hosts)]}"
    known = among.broadcast(cache[key] if key in cache else None, 0)
    mine = _measured(ranks, device)
    everybody = among.gather(lambda: mine)
    found = [max(same) for same in zip(*everybody, strict=True)]
    if _is_whole(known):
        found = faster(known, found)
    if among.rank == 0 and found != known:
        cache[key] = found
        cache.save()
    reduce, pieces, gather = (
        Speed(1 / per_byte, latency)
        for latency, per_byte in zip(found[:-1:2], found[1:-1:2], strict=True)
    )
    return Lane(
        NETWORK, RANKS, gather, None, compute_share=found[-1], reduce=reduce, reduce_pieces=pieces,
        share=gather,
    )


def in_groups(everybody: Lane, within: Lane, across: Lane, group_size: int) -> Lane:
    """Return the lane of ranks in groups, each of which has all pieces of parameters.

    Sums go to their owners within each group; owners of the same pieces then add those up.

    Args:
        everybody: of all ranks.
        within: of one group.
        across: of ranks with the same pieces.
        group_size: how many are in a group.
    """
    sums, shares = within.reduce_pieces, across.reduce
    assert sums is not None and shares is not None, "networks reduce"
    seconds_per_byte = 1 / sums.bytes_per_second + 1 / (group_size * shares.bytes_per_second)
    both = Speed(1 / seconds_per_byte, sums.latency_seconds + shares.latency_seconds)
    return replace(everybody, read=within.read, share=within.share, reduce_pieces=both)


def _is_whole(known: object) -> bool:
    return (
        isinstance(known, Sequence) and len(known) == 2 * len(_KINDS) + 1
        and all(isinstance(value, float) for value in known) and min(known[1:-1:2]) > 0
    )


def faster(known: Measured, found: Measured) -> Measured:
    """Return the times of whichever was disturbed less, of each kind; the share goes with most."""
    times = [min(pair) for pair in zip(known[:-1], found[:-1], strict=True)]
    is_newer = sum(found[1:-1:2]) < sum(known[1:-1:2])
    return [*times, (found if is_newer else known)[-1]]


# -- the kinds of collectives, in the order in which they are measured


def _start_sums(ranks: Ranks, tensor: torch.Tensor) -> list[Sent]:
    return [ranks.start(tensor)]


def _start_sums_of_pieces(ranks: Ranks, tensor: torch.Tensor) -> list[Sent]:
    return [ranks.start_for(tensor[a:b], owner) for owner, (a, b) in _parts(ranks, tensor)]


def _start_gathering(ranks: Ranks, tensor: torch.Tensor) -> list[Sent]:
    return [ranks.start_sharing(tensor[a:b], owner) for owner, (a, b) in _parts(ranks, tensor)]


def _parts(ranks: Ranks, tensor: torch.Tensor) -> list[tuple[int, tuple[int, int]]]:
    return [*enumerate(Pieces.even(tuple(tensor.shape), ranks.size).rows)]


Start = Callable[[Ranks, torch.Tensor], list[Sent]]
_KINDS: tuple[Start, ...] = (_start_sums, _start_sums_of_pieces, _start_gathering)


def _measured(ranks: Ranks, device: torch.device) -> Measured:
    """Return what this rank sees."""
    small = torch.zeros(max(SMALL_BYTES // 4, ranks.size), device=device)
    large = torch.zeros(LARGE_BYTES // 4, device=device)
    is_shared = device.type == "cpu"  # a GPU's network takes none of what computes
    rate = products_per_second() if is_shared else 0.0
    latencies: dict[Start, list[float]] = {kind: [] for kind in _KINDS}
    seconds: dict[Start, list[float]] = {kind: [] for kind in _KINDS}
    shares: list[float] = []
    for _ in range(1 + NUM_ROUNDS):  # the first round connects
        for kind in _KINDS:
            latencies[kind].append(_timed(ranks, kind, small, computes=False)[0])
            took, num_products = _timed(ranks, kind, large, computes=is_shared)
            seconds[kind].append(took)
            shares.append(1 - num_products / (rate * took) if is_shared else 0.0)
    found = []
    for kind in _KINDS:
        latency = min(latencies[kind][1:])
        found += [latency, max(min(seconds[kind][1:]) - latency, 1e-9) / LARGE_BYTES]
    return [*found, min(max(statistics.median(shares[len(_KINDS):]), 0.0), 1.0)]


def _timed(ranks: Ranks, start: Start, tensor: torch.Tensor, computes: bool) -> tuple[float, int]:
    """Return how long a collective takes that all ranks start at once, and products meanwhile."""
    ranks.exchange(0)
    product, num_products = products(), 0
    begin = time.perf_counter()
    sent = start(ranks, tensor)
    while computes and not all(one.work.is_completed() for one in sent):
        product()
        num_products += 1
    for one in sent:
        ranks.wait(one)
    if tensor.device.type != "cpu":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - begin, num_products
