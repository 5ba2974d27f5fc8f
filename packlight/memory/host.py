"""Buffers of a GPU in pinned memory of the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from packlight.errors import OffloadError
from packlight.memory.tier import PIECE_BYTES, SlotSpec, Tier, storage_bytes
from packlight.memory.transfers import CopyStream, Worker
from packlight.units import format_bytes


class HostTier(Tier):
    """Slots in host memory: pinned, and filled on a stream of their own, where the device is CUDA.

    On the CPU, plain copies by a worker thread: that saves no memory, and serves tests.
    All memory is allocated at once. torch's pinned allocator rounds up to powers of two, so a slot
    consists of parts of such sizes; less than half a piece (2 MiB) per slot is wasted.

    The CUDA side is not yet run on a GPU.

    Args:
        slots: what they hold, all on one device; a slot's number is its position here.
        verify: see `Tier`. On CUDA it waits for each transfer.

    Raises:
        OffloadError: slots on several devices, or more than the host can give.
    """

    def __init__(self, slots: Sequence[SlotSpec], *, verify: bool = False) -> None:
        devices = {torch.device(spec.device) for spec in slots} or {torch.device("cpu")}
        if len(devices) > 1:
            names = sorted(map(str, devices))
            message = f"slots on {names}; a HostTier serves one device"
            raise OffloadError(message, hint="make several")
        device = devices.pop()
        store = _HostStore(slots, is_pinned=device.type == "cuda")
        self.host_bytes = sum(part.numel() for parts in store.parts for part in parts)
        transfers = (
            CopyStream(device, store.close) if device.type == "cuda" else Worker(store.close)
        )
        super().__init__(slots, store, transfers, verify)


class _HostStore:
    """Per slot, the parts in host memory that make up its storage."""

    def __init__(self, slots: Sequence[SlotSpec], is_pinned: bool) -> None:
        needed_bytes = sum(spec.num_bytes for spec in slots)
        try:
            self.parts = [
                [
                    torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
                    for size in part_sizes(spec.num_bytes)
                ]
                for spec in slots
            ]
        except RuntimeError as error:
            raise OffloadError(
                f"the host does not give {format_bytes(needed_bytes)} ({needed_bytes} bytes) to "
                f"offload to: {error}",
                needed_bytes=needed_bytes,
                hint="offload to a directory, or raise the memory budget",
            ) from error

    def close(self) -> None:
        """Give the memory back."""
        self.parts.clear()

    def write(self, slot: int, tensor: torch.Tensor) -> Iterator[None]:
        """Copy a tensor's storage into a slot."""
        for host, own in self._pairs(slot, tensor):
            host.copy_(own, non_blocking=True)
            yield

    def read(self, slot: int, tensor: torch.Tensor) -> Iterator[None]:
        """Copy a slot into a tensor's storage."""
        for host, own in self._pairs(slot, tensor):
            own.copy_(host, non_blocking=True)
            yield

    def _pairs(
        self, slot: int, tensor: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        own = storage_bytes(tensor)
        position = 0
        for part in self.parts[slot]:
            size = min(part.numel(), own.numel() - position)
            yield part[:size], own[position : position + size]
            position += size


def part_sizes(num_bytes: int) -> list[int]:
    """Return powers of two, largest first, that add up to a storage, the last one rounded up.

    >>> [size >> 20 for size in part_sizes((64 + 8 + 1) * 2**20)], part_sizes(100)
    ([64, 8, 1], [128])
    """
    sizes = []
    while num_bytes > 0:
        is_last = num_bytes <= PIECE_BYTES
        size = 1 << ((num_bytes - 1).bit_length() if is_last else num_bytes.bit_length() - 1)
        sizes.append(size)
        num_bytes -= size
    return sizes
