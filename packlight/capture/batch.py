"""What a batch holds: any nesting of mappings, sequences, dataclasses and objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


def children(batch: Any) -> list[tuple[str, Any, Any]] | None:
    """Return (path, key, value) of what a container holds; None for a leaf."""
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):
        return [(f"[{key!r}]", key, batch[key]) for key in batch.keys()]
    if isinstance(batch, (tuple, list)) and not isinstance(batch, torch.Size):
        return [(f"[{index}]", index, value) for index, value in enumerate(batch)]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in dataclasses.fields(batch)]
        return [(f".{name}", name, getattr(batch, name)) for name in names]
    return None


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """Return all tensors in a batch."""
    return [leaf for _, leaf in batch_leaves(batch) if isinstance(leaf, torch.Tensor)]


def batch_leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of all that a batch holds, attributes of unknown objects included."""
    held = children(batch)
    if held is None and not isinstance(batch, torch.Tensor):
        attributes: dict[str, Any] = getattr(batch, "__dict__", {})
        if any(isinstance(value, torch.Tensor) for value in attributes.values()):
            held = [(f".{name}", name, value) for name, value in attributes.items()]
    if held is None:
        yield path, batch
        return
    for place, _, value in held:
        yield from batch_leaves(value, path + place)


def plain_leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of what containers hold; an unknown object is a leaf."""
    held = children(batch)
    if held is None:
        yield path, batch
        return
    for place, _, value in held:
        yield from plain_leaves(value, path + place)


def rebuilt(batch: Any, leaves: Iterator[Any]) -> Any:
    """Return containers of the same types with other leaves, in the order of `plain_leaves`."""
    held = children(batch)
    if held is None:
        return next(leaves)
    values = [rebuilt(value, leaves) for _, _, value in held]
    if isinstance(batch, tuple):
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    new = copy.copy(batch)
    for (_, key, _), value in zip(held, values, strict=True):
        if hasattr(batch, "__getitem__"):
            new[key] = value
        else:
            object.__setattr__(new, key, value)  # a dataclass may be frozen
    return new


def fresh(batch: Any) -> Any:
    """Return a batch of the same leaves in containers of its own: what is taken out stays there.

    What cannot be copied that way (a mapping that takes no values) is returned as it is.
    """
    try:
        return rebuilt(batch, (leaf for _, leaf in plain_leaves(batch)))
    except (TypeError, AttributeError, ValueError):
        return batch


# The dicts in a batch that is a dict itself: key -> those in there. None for what is no dict.
Dicts = dict[Any, Any]


def dicts_of(batch: Any) -> Dicts | None:
    """Return where in a batch there are dicts within dicts."""
    if type(batch) is not dict:
        return None
    found = {key: dicts_of(value) for key, value in batch.items()}
    return {key: inner for key, inner in found.items() if inner is not None}


def own(batch: Any, dicts: Dicts | None) -> Any:
    """Return a batch whose dicts are copies, for a loss that is being traced.

    Were they inputs of the trace, taking something out of one would have to be done again to what
    is passed, so that dynamo would guard every value in it.

    Args:
        batch: of which nothing is looked at but dicts: that would be guarded, too.
        dicts: from `dicts_of`.
    """
    if dicts is None:
        return batch
    return {**batch, **{key: own(batch[key], inner) for key, inner in dicts.items()}}
