"""What the generated step calls to send a buffer away and to get it back.

    tier.offload(slot, tensor)      starts writing the tensor's storage, returns at once
    tier.wait_written(slot)         before the buffer's memory is freed
    tier.fetch(slot) -> tensor      allocates now, starts reading, returns at once
    tier.wait_fetched(slot)         before the first use of what fetch returned

Transfers happen in the order of these calls, one at a time. A tier is used by one thread at a time.
"""

from __future__ import annotations

import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch

from packlight.errors import OffloadError
from packlight.memory.transfers import Transfer, Transfers
from packlight.units import format_bytes

# Errors and cancellation are noticed between pieces; this is also all that is ever staged.
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What a slot holds: one storage, and the tensor that looks at it.

    Attributes:
        shape, stride, dtype, device: of the tensor that `fetch` returns (a GPU with its index).
        num_bytes: of the whole storage.
        storage_offset: of the tensor in its storage, in elements.
        name: what messages call the buffer.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    num_bytes: int
    storage_offset: int = 0
    name: str = ""

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "") -> SlotSpec:
        """Return the slot that fits a tensor."""
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.untyped_storage().nbytes(),
            int(tensor.storage_offset()),
            name,
        )

    def allocate(self) -> torch.Tensor:
        """Return a tensor as declared, on a storage of exactly `num_bytes`."""
        storage = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
        tensor = torch.empty(0, dtype=self.dtype, device=self.device)
        return tensor.set_(storage.untyped_storage(), self.storage_offset, self.shape, self.stride)


class Store(Protocol):
    """The memory behind a tier. Its methods return generators that move one piece at a time."""

    def write(self, slot: int, tensor: torch.Tensor) -> Iterator[None]:
        """Copy a tensor's whole storage into a slot."""
        ...

    def read(self, slot: int, tensor: torch.Tensor) -> Iterator[None]:
        """Copy a slot into a tensor's whole storage."""
        ...


@dataclass(slots=True)
class SlotState:
    """The latest transfers of a slot, and the checksum of its value."""

    offload: Transfer | None = None
    fetch: Transfer | None = None
    checksum: int | None = None


class Tier:
    """Slots in another memory; the calls above. Base of `DiskTier` and `HostTier`.

    A failure in a transfer is raised by the next call, whichever it is, and by every call after
    that until `reset()`. A slot gives back what was written to it in whole, or an error.

    Args:
        slots: what they hold; a slot's number is its position here.
        store: the memory.
        transfers: who moves.
        verify: checksum each storage in `offload` and after it is read again (CRC-32, 26 ms per
            100 MiB each time, the first in the calling thread). Finds buffers that are overwritten
            while they are being written as well as memory that does not keep what it was given.
    """

    def __init__(
        self, slots: Sequence[SlotSpec], store: Store, transfers: Transfers, verify: bool = False
    ) -> None:
        self.slots = tuple(slots)
        self._store = store
        self._transfers = transfers
        self._verify = verify
        self._states = [SlotState() for _ in self.slots]
        self._open: deque[Transfer] = deque()  # not waited for yet, in order
        self._finalizer = weakref.finalize(self, transfers.stop)

    def offload(self, slot: int, tensor: torch.Tensor) -> None:
        """Start writing a tensor's storage into a slot.

        Args:
            slot: its number.
            tensor: as the slot declares it. Nobody may write to it before `wait_written`.

        Raises:
            OffloadError: for a tensor that differs from the slot's declaration, for a slot with
                transfers that were not waited for, and for what an earlier transfer raised.
        """
        spec, state = self._slot(slot)
        self._check_tensor(spec, slot, tensor)
        if any(t in self._open for t in (state.offload, state.fetch) if t is not None):
            raise OffloadError(
                f"{self._name(slot)} is offloaded again while earlier transfers of it are open",
                hint="call wait_written(slot) and wait_fetched(slot) before",
            )
        state.fetch = None
        state.checksum = checksum(tensor) if self._verify else None
        pieces = partial(self._store.write, slot, tensor)
        state.offload = self._transfers.submit(f"writing {self._name(slot)}", pieces)
        self._open.append(state.offload)

    def wait_written(self, slot: int) -> None:
        """Return when the slot's value is written; no reference to its tensor is kept."""
        _, state = self._slot(slot)
        if state.offload is None:
            raise OffloadError(f"{self._name(slot)} was not offloaded since the step began")
        self._wait(state.offload)

    def fetch(self, slot: int) -> torch.Tensor:
        """Return a new tensor that is being filled with the slot's value.

        Returns:
            A tensor as the slot declares it, to be used after `wait_fetched`. It is all that
            is allocated.

        Raises:
            OffloadError: for a slot that holds nothing, and for what an earlier transfer raised.
        """
        spec, state = self._slot(slot)
        if state.offload is None:
            raise OffloadError(
                f"{self._name(slot)} is fetched but holds nothing",
                hint="offload() it first; reset() empties all slots",
            )
        tensor = spec.allocate()
        pieces = partial(_read, self._store, slot, tensor, state.checksum, self._name(slot))
        state.fetch = self._transfers.submit(f"reading {self._name(slot)}", pieces)
        self._open.append(state.fetch)
        return tensor

    def wait_fetched(self, slot: int) -> None:
        """Return when what `fetch` returned last for this slot holds its value."""
        _, state = self._slot(slot)
        if state.fetch is None:
            raise OffloadError(f"{self._name(slot)} was not fetched since it was offloaded")
        self._wait(state.fetch)

    def wait_all(self) -> None:
        """Return when all transfers are over; the end of a step. Slots keep their values."""
        self._check()
        if self._open:
            self._wait(self._open[-1])

    def is_idle(self) -> bool:
        """Return whether the transfers asked for so far are over, without waiting."""
        self._check()
        return all(transfer.is_over for transfer in self._open)

    def reset(self) -> None:
        """Stop transfers, empty all slots, keep no tensor, forget failures: after a failed step."""
        if self._finalizer.alive:
            self._transfers.reset()
        self._open.clear()
        self._states = [SlotState() for _ in self.slots]

    def recover(self) -> None:
        """Stop transfers and forget failures, as `reset`; slots written in whole keep their values.

        A slot whose latest write is not complete holds nothing.
        """
        kept = [
            state if state.offload is not None and state.offload.is_complete else SlotState()
            for state in self._states
        ]
        self.reset()
        self._states = kept

    def close(self) -> None:
        """Stop transfers and give everything back. Doing it twice is fine."""
        self._finalizer()
        self._open.clear()
        self._states = [SlotState() for _ in self.slots]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        if not self._finalizer.alive:
            raise OffloadError("the tier is closed", hint="make a new one")
        self._transfers.check()

    def _slot(self, slot: int) -> tuple[SlotSpec, SlotState]:
        self._check()
        assert 0 <= slot < len(self.slots), f"slot {slot} of {len(self.slots)}"
        return self.slots[slot], self._states[slot]

    def _wait(self, transfer: Transfer) -> None:
        self._transfers.wait(transfer)
        if transfer in self._open:
            while (earlier := self._open.popleft()) is not transfer:
                self._transfers.wait(earlier)  # over as well, since transfers keep their order

    def _name(self, slot: int) -> str:
        return slot_name(self.slots, slot)

    def _check_tensor(self, spec: SlotSpec, slot: int, tensor: torch.Tensor) -> None:
        found = SlotSpec.of(tensor, spec.name)
        if found != spec or tensor.is_conj() or tensor.is_neg():
            lazy = " with a lazy conjugation or negation" if found == spec else ""
            raise OffloadError(
                f"{self._name(slot)} is not what was declared\n  declared {spec}\n"
                f"  offered  {found}{lazy}"
            )


def slot_name(slots: Sequence[SlotSpec], slot: int) -> str:
    """Return what messages call a slot: "'relu' (12.0 MiB)"."""
    spec = slots[slot]
    return f"{spec.name or f'slot {slot}'!r} ({format_bytes(spec.num_bytes)})"


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a uint8 tensor of shape (num_bytes,) that looks at a tensor's whole storage."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's whole storage."""
    result = 0
    for piece in storage_bytes(tensor).split(PIECE_BYTES):
        result = zlib.crc32(piece.cpu().numpy(), result)
    return result


def _read(
    store: Store, slot: int, tensor: torch.Tensor, expected: int | None, name: str
) -> Iterator[None]:
    yield from store.read(slot, tensor)
    if expected is not None and checksum(tensor) != expected:
        raise OffloadError(
            f"reading {name}: the bytes differ from those that were offloaded",
            hint="either the tensor was written to between offload() and wait_written(), "
            "or the disk does not keep what it is given",
        )
