"""What a batch holds: any nesting of mappings, sequences, dataclasses and objects."""

from __future__ import annotations

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
