"""Who looks at which memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch


def storage_identity(tensor: torch.Tensor) -> int:
    """Return what two tensors have in common if and only if they look at one storage."""
    return int(tensor.untyped_storage()._cdata)


def num_storage_references(tensor: torch.Tensor) -> int:
    """Return a number that grows with every further tensor on a tensor's storage."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def lazily_negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view that is negated when it is read."""
    return torch._neg_view(tensor)


class StorageWatch:
    """Sees whether anybody holds a tensor's memory, and holds nothing itself.

    Relied upon: a weak reference to a storage keeps its count of references readable; a storage
    that was looked at from Python counts one reference of its own; every tensor counts one.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.num_bytes = storage.nbytes()
        self._reference: Any = storage._weak_ref()
        weakref.finalize(self, torch.UntypedStorage._free_weak_ref, self._reference).atexit = False

    @property
    def num_tensors(self) -> int:
        """How many tensors look at the memory, 0 if it is gone."""
        return max(0, torch._C._storage_Use_Count(self._reference) - 1)


def version(tensor: torch.Tensor) -> int:
    """Return a number that changes with every change of a tensor in place."""
    return 0 if tensor.is_inference() else tensor._version
