"""Tensors that lie on a disk between uses and are in memory only around them.

Between uses, whoever has such a tensor (a parameter its values, an optimizer its state) is given
one that is memory-mapped onto its very place in the file. So whoever looks at it between two steps
(`state_dict`, `evaluate`, a checkpoint) sees its values, whoever writes to it changes what the next
step reads, and neither allocates memory. The mapping lasts as long as a tensor on it, whatever
becomes of the training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from packlight.memory.disk import DiskTier
from packlight.memory.tier import SlotSpec
from packlight.moves.stream.parameters import ParameterHolder, ParameterSlots
from packlight.moves.stream.state import Slots, StateHolder

# What is streamed: "parameter" or "state", and the id of the parameter.
Key = tuple[str, int]


class Holder(Protocol):
    """Where one tensor is found, and put when it moves."""

    def get(self) -> torch.Tensor | None:
        """Return the tensor, None if it does not exist yet."""
        ...

    def set(self, value: torch.Tensor) -> None:
        """Put another tensor in its place."""
        ...

    @property
    def has_viewers(self) -> bool:
        """Whether others look at the tensor's memory."""
        ...


Wanted = Mapping[Key, Sequence[tuple[Holder, SlotSpec]]]


@dataclass(frozen=True)
class Streaming:
    """What of a model and its optimizer lies on the disk between uses.

    Attributes:
        states: optimizer state, by parameter and name.
        parameters: parameters, and buffers of the model that are as large.
    """

    states: Slots = field(default_factory=dict)
    parameters: ParameterSlots = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.states or self.parameters)

    @property
    def state_bytes(self) -> int:
        """Size of all optimizer state that is streamed."""
        return sum(spec.num_bytes for named in self.states.values() for spec in named.values())

    @property
    def parameter_bytes(self) -> int:
        """Size of all parameters (and buffers) that are streamed."""
        return sum(spec.num_bytes for spec in self.parameters.values())

    def of_update(self, parameter: torch.nn.Parameter) -> list[SlotSpec]:
        """Return what has to be fetched to update a parameter, and written afterwards."""
        own = self.parameters.get(parameter)
        return [*self.states.get(parameter, {}).values(), *([] if own is None else [own])]

    def places(self, optimizer: torch.optim.Optimizer | None) -> Wanted:
        """Return who holds what is streamed."""
        wanted: dict[Key, list[tuple[Holder, SlotSpec]]] = {}
        for tensor, spec in self.parameters.items():
            wanted["parameter", id(tensor)] = [(ParameterHolder(tensor), spec)]
        for parameter, named in self.states.items():
            assert optimizer is not None
            if named:
                wanted["state", id(parameter)] = [
                    (StateHolder(optimizer, parameter, name), spec) for name, spec in named.items()
                ]
        return wanted


@dataclass
class _Place:
    """One tensor's place on the disk.

    Attributes:
        holder: of the tensor.
        slot: of the tier.
        address: where its mapping is.
        is_fetched: it is in memory for a use, to be let go of after it.
        is_changed: what is in memory is newer than what is on the disk.
    """

    holder: Holder
    slot: int
    address: int
    is_fetched: bool = False
    is_changed: bool = False

    @property
    def is_resting(self) -> bool:
        """Whether the holder has the mapping; it may have been given something else by anybody."""
        value = self.holder.get()
        return value is not None and value.data_ptr() == self.address


class StreamedTensors:
    """Tensors on a disk; the calls of a tier, by key.

    Args:
        directory: where the file is; made when the first tensors are to go there.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._places: dict[Key, list[_Place]] = {}

    @cached_property
    def _tier(self) -> DiskTier:
        assert self._directory is not None, "tensors are streamed only where there is a disk"
        return DiskTier(self._directory, ())

    def arrange(self, wanted: Wanted) -> None:
        """Before a step: have what is wanted on the disk, and the rest in memory.

        What somebody has put in a mapping's place meanwhile (`load_state_dict` of an optimizer) is
        written.

        Raises:
            OffloadError: each tensor is then either in memory or on the disk, with its values.
        """
        if not (wanted or self._places):
            return
        try:
            self._tier.wait_all()
            self._add({key: held for key, held in wanted.items() if key not in self._places})
            for key, places in self._places.items():
                for place in places:
                    if key in wanted:
                        self._park(place)
                    else:
                        self._bring_back(place)
        except BaseException:
            self.reset()
            raise
        self._tier.forget_pages()

    def _add(self, wanted: Wanted) -> None:
        first = len(self._tier.slots)
        self._tier.extend([spec for held in wanted.values() for _, spec in held])
        for key, held in wanted.items():
            self._places[key] = []
            for slot, (holder, _) in enumerate(held, start=first):
                self._places[key].append(_Place(holder, slot, self._tier.mapped(slot).data_ptr()))
            first += len(held)

    def _park(self, place: _Place) -> None:
        value = place.holder.get()
        if value is not None and not place.is_resting:
            self._tier.offload(place.slot, value)
            del value
            self._tier.wait_written(place.slot)
            self._rest(place)

    def _bring_back(self, place: _Place) -> None:
        """Read a tensor, unless somebody looks at the mapping and would see no later update."""
        if place.is_resting and not place.holder.has_viewers:
            value = self._tier.fetch(place.slot)
            self._tier.wait_fetched(place.slot)
            place.holder.set(value)

    def _rest(self, place: _Place) -> None:
        if place.holder.get() is not None:
            place.holder.set(self._tier.mapped(place.slot))
        place.is_fetched = place.is_changed = False

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the mapping of something that is on the disk."""
        return any(
            tensor.data_ptr() == place.address for held in self._places.values() for place in held
        )

    # -- in a step

    def fetch(self, key: Key) -> torch.Tensor | None:
        """Start bringing something into memory; its holder has it at once.

        Returns:
            The (last) tensor; None where nothing exists yet.
        """
        fetched = None
        for place in self._places[key]:
            if place.is_resting:
                fetched = self._tier.fetch(place.slot)
                place.is_fetched = True  # before anything half read can be seen
                place.holder.set(fetched)
        return fetched

    def wait_fetched(self, key: Key) -> None:
        """Return when what was fetched is in memory."""
        for place in self._places[key]:
            if place.is_fetched:
                self._tier.wait_fetched(place.slot)

    def updating(self, key: Key) -> None:
        """Say that what is in memory is about to change: whatever happens, it must not be lost."""
        for place in self._places[key]:
            place.is_changed = True

    def offload(self, key: Key) -> None:
        """Start writing what was changed."""
        for place in self._places[key]:
            value = place.holder.get()
            if value is not None:
                self._tier.offload(place.slot, value)

    def wait_written(self, key: Key) -> None:
        """Return when it is written."""
        for place in self._places[key]:
            if place.holder.get() is not None:
                self._tier.wait_written(place.slot)
                place.is_changed = False

    def drop(self, key: Key) -> None:
        """Let go of the memory: what is on the disk is up to date."""
        for place in self._places[key]:
            assert not place.is_changed, f"an update of {key[0]} was not written"
            self._rest(place)

    @contextmanager
    def in_memory(self, parameter: torch.nn.Parameter) -> Iterator[None]:
        """Have a parameter and its state in memory to be changed, and written afterwards."""
        keys = [k for k in (("parameter", id(parameter)), ("state", id(parameter)))
                if k in self._places]
        for key in keys:
            self.fetch(key)
        for key in keys:
            self.wait_fetched(key)
            self.updating(key)
        yield
        for key in keys:
            self.offload(key)
        for key in keys:
            self.wait_written(key)
            self.drop(key)

    def reset(self) -> None:
        """After a failed step: no value is lost, and what was not changed is on the disk only.

        What was changed stays in memory, since it may not be written; the next step writes it.
        """
        if self._places:
            self._tier.recover()
        for places in self._places.values():
            for place in places:
                if place.is_fetched and not place.is_changed:
                    self._rest(place)
                place.is_fetched = place.is_changed = False


class Resting(Protocol):
    """What rests elsewhere between uses (`StreamedTensors`, `ShardedParameters`), by key."""

    def fetch(self, key: Key) -> torch.Tensor | None:
        """Start bringing something into memory."""
        ...

    def wait_fetched(self, key: Key) -> None:
        """Return when it is there."""
        ...

    def updating(self, key: Key) -> None:
        """Say that what is in memory is about to change."""
        ...

    def offload(self, key: Key) -> None:
        """Start writing what was changed."""
        ...

    def wait_written(self, key: Key) -> None:
        """Return when it is written."""
        ...

    def drop(self, key: Key) -> None:
        """Let go of the memory."""
        ...


@dataclass(frozen=True)
class StreamedBuffers:
    """What rests elsewhere as a step program sees it: a tier whose slots are a graph's buffers.

    Attributes:
        held: who brings a buffer, and what it is called there.
    """

    held: Mapping[int, tuple[Resting, Key]]

    def fetch(self, buffer: int) -> torch.Tensor | None:
        """See `Resting.fetch`."""
        holder, key = self.held[buffer]
        return holder.fetch(key)

    def wait_fetched(self, buffer: int) -> None:
        """See `Resting.wait_fetched`."""
        holder, key = self.held[buffer]
        holder.wait_fetched(key)

    def updating(self, buffer: int) -> None:
        """See `Resting.updating`."""
        holder, key = self.held[buffer]
        holder.updating(key)

    def offload(self, buffer: int) -> None:
        """See `Resting.offload`."""
        holder, key = self.held[buffer]
        holder.offload(key)

    def wait_written(self, buffer: int) -> None:
        """See `Resting.wait_written`."""
        holder, key = self.held[buffer]
        holder.wait_written(key)

    def drop(self, buffer: int) -> None:
        """See `Resting.drop`."""
        holder, key = self.held[buffer]
        holder.drop(key)
