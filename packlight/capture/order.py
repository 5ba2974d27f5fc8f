"""The order of a rewritten graph's calls: each as near to its old place as it can be."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Mapping
from typing import Any, TypeVar

Item = TypeVar("Item", bound=Hashable)


def in_order(needed: Mapping[Item, Collection[Item]], place: Mapping[Item, Any]) -> list[Item]:
    """Return items after all that they need, those that could come next in the order of places.

    Args:
        needed: item -> other items; no item needs itself through others.
        place: item -> anything that sorts; no two are equal.
    """
    users: dict[Item, list[Item]] = {item: [] for item in needed}
    missing = {item: len(sources) for item, sources in needed.items()}
    for item, sources in needed.items():
        for source in sources:
            users[source].append(item)
    of_place = {place[item]: item for item in needed}
    ready = [place[item] for item in needed if not missing[item]]
    heapq.heapify(ready)
    ordered: list[Item] = []
    while ready:
        item = of_place[heapq.heappop(ready)]
        ordered.append(item)
        for user in users[item]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])
    assert len(ordered) == len(needed), "what is moved as one is closed: no path leaves and returns"
    return ordered
