"""Transfers in generated code: calls of the tier, and of the holders of what is streamed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packlight.lower.facts import Facts
from packlight.lower.values import Values, plain_meta
from packlight.memory.tier import SlotSpec


def still_here(value: torch.Tensor) -> None:
    """Do nothing: generated code keeps a value until here, and drops it in its own thread."""


class TransferWriter:
    """Writes transfers and the waits for them, section by section.

    Attributes:
        slots: what the tier has to hold.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.joint = facts, facts.step.joint
        self.slots: list[SlotSpec] = []
        self._slot_of: dict[int, int] = {}
        self._being_written: set[int] = set()
        self._being_fetched: set[int] = set()
        self._meta_of: dict[int, dict[str, Any]] = {}

    def begin(self, values: Values, helpers: dict[str, fx.Node]) -> None:
        """Go on in another section."""
        self._values, self._helpers, self._graph = values, helpers, values.graph

    def offload(self, buffer: int) -> None:
        """Start writing a buffer away."""
        if buffer in self.facts.unused_states:
            return
        self._being_written.add(buffer)
        arguments: tuple[Any, ...] = self._place(buffer)
        if buffer not in self.facts.streamed:
            value = self._values.whole(buffer)
            self._meta_of[buffer] = plain_meta(value.meta)
            arguments = (*arguments, value)
        self._graph.call_method("offload", arguments)

    def fetch(self, buffer: int) -> None:
        """Start bringing a buffer back."""
        if buffer in self.facts.unused_states:
            return
        self._being_fetched.add(buffer)
        fetched = self._graph.call_method("fetch", self._place(buffer))
        if buffer in self.facts.values:
            fetched.meta = {**self._meta_of.get(buffer, {})}
            self._values.place_whole(buffer, fetched)

    def wait_fetched(self, buffer: int) -> None:
        """Wait until a buffer is there, if it is on its way."""
        self._wait(buffer, "wait_fetched", self._being_fetched)

    def wait_written(self, buffer: int) -> None:
        """Wait until a buffer's memory may change, if it is being written away."""
        self._wait(buffer, "wait_written", self._being_written)

    def free(self, buffer: int) -> None:
        """End a buffer's life when its transfers are over."""
        self.wait_written(buffer)
        self.wait_fetched(buffer)
        if buffer in self.facts.streamed:
            self._graph.call_method("drop", self._place(buffer))

    def updating(self, buffer: int) -> None:
        """Say that a buffer is about to change."""
        if buffer in self.facts.streamed:
            self._graph.call_method("updating", self._place(buffer))

    def _wait(self, buffer: int, method: str, pending: set[int]) -> None:
        if buffer not in pending:
            return
        pending.discard(buffer)
        self._graph.call_method(method, self._place(buffer))
        if buffer not in self.facts.streamed:  # nobody must drop it before
            self._graph.call_function(still_here, (self._values.whole(buffer),))

    def _place(self, buffer: int) -> tuple[fx.Node, int]:
        """Return the object that transfers a buffer, and what it calls that buffer."""
        if buffer in self.facts.streamed:
            return self._helpers["streamed"], buffer
        if buffer not in self._slot_of:
            self._slot_of[buffer] = len(self.slots)
            self.slots.append(self._slot(buffer))
        return self._helpers["tier"], self._slot_of[buffer]

    def _slot(self, buffer: int) -> SlotSpec:
        described = self.joint.graph.buffers[buffer]
        num_bytes, name = described.bytes, described.name
        if buffer in self.facts.states:
            return SlotSpec(
                (num_bytes,), (1,), torch.uint8, torch.device("cpu"), num_bytes, name=name
            )
        result_of = {kept: result for result, kept in self.facts.kept_of.items()}
        root = result_of.get(buffer, self.joint.root_of_buffer[buffer])
        assert root is not None, f"nothing stands for buffer {buffer}"
        value: Any = root.meta["val"]
        if root.op == "placeholder":  # a snapshot of it is what goes
            with value.fake_mode:
                return SlotSpec.of(value.clone(), name)
        return SlotSpec(
            tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype,
            value.device, num_bytes, int(value.storage_offset()), name,
        )
