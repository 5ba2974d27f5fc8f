"""How long ranks take to exchange what they have: latency and bandwidth, per topology.

Rings (Patarasuk and Yuan 2009; Thakur et al. 2005): of n ranks each sends n - 1 messages of 1/n of
the bytes in an all-gather or a reduce-scatter, twice as many in an all-reduce. Where a group has
several members in a node, each node's adapters carry all of their rings at once, so a group's ring
runs at the speed of as many adapters as it has members in a node.
"""

from __future__ import annotations

from packlight.cluster.devices import Cluster, Link


def all_gather_seconds(cluster: Cluster, num_bytes: float, size: int, distance: int = 1) -> float:
    """Return the seconds until each rank has all `num_bytes`, of which it has 1/size.

    Args:
        cluster: where the ranks are.
        num_bytes: of the whole.
        size: how many ranks there are in the group.
        distance: between neighbours of the group, in GPUs.
    """
    if size <= 1 or not num_bytes:
        return 0.0
    link = cluster.link(distance, size)
    within = max(1, min(size, cluster.per_node // distance))
    rate = link.rate * (within if link is not cluster.node_link else 1)
    rate = min(rate, cluster.node_link.rate) if within > 1 else rate
    return (size - 1) * link.latency_seconds + (size - 1) / size * num_bytes / rate


def reduce_scatter_seconds(
    cluster: Cluster, num_bytes: float, size: int, distance: int = 1
) -> float:
    """Return the seconds until each rank has 1/size of the sum of `num_bytes` that all have."""
    return all_gather_seconds(cluster, num_bytes, size, distance)


def all_reduce_seconds(cluster: Cluster, num_bytes: float, size: int, distance: int = 1) -> float:
    """Return the seconds until each rank has the sum of `num_bytes` that all have."""
    return 2 * all_gather_seconds(cluster, num_bytes, size, distance)


def send_seconds(cluster: Cluster, num_bytes: float, distance: int) -> float:
    """Return the seconds of a message to the GPU that is so far away."""
    return send_over(cluster.link(distance), num_bytes)


def send_over(link: Link, num_bytes: float) -> float:
    """Return the seconds of a message over a link."""
    return link.latency_seconds + num_bytes / link.rate
