"""What a schedule becomes: generated functions, what they take and leave, what lies outside.

A schedule has cuts: where the forward ends, where a pipeline stage hands on. What lies between two
cuts is a `Section`, one generated function whose code drops each value after its last use. `fit`
runs one section, the torch.compile backend two. Who runs a program carries what one section leaves
to those that take it: autograd does for the backend, a `Frame` (frame.py) elsewhere.

Beside values, sections are given helpers: objects that decide what becomes of results and gradients
(`StepEvents`), of buffers that leave memory (a `Tier`), of parameters and optimizer state that do
(`StreamedBuffers`), and of gradients that all ranks add up (a `Reducer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from packlight.memory.tier import SlotSpec

# In a node's metadata: the operation that it runs.
OPERATION_KEY = "packlight_operation"


class StepEvents(Protocol):
    """What a running step tells its owner."""

    def result(self, index: int, value: torch.Tensor) -> None:
        """Forward result `index` is known; raising here leaves all parameters as they are."""

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        """The gradient of a primal is complete.

        Its storage is the receiver's to keep if `is_last_use`; else others will still read or
        overwrite it.
        """

    def gradients(self, complete: Sequence[tuple[int, torch.Tensor, bool]]) -> None:
        """Gradients are complete that are to be used up together: what `gradient` takes of each."""

    def reduced_gradient(self, primal: int, gradient: torch.Tensor) -> None:
        """The gradient of a primal, added up over all ranks, is complete; it is the receiver's."""

    def share(self, primal: int) -> None:
        """All ranks have updated their rows of a parameter, and are to give them to one another."""


class IgnoredEvents:
    """For rehearsals: results and gradients are dropped."""

    def result(self, index: int, value: torch.Tensor) -> None:
        """Do nothing."""

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        """Do nothing."""

    def gradients(self, complete: Sequence[tuple[int, torch.Tensor, bool]]) -> None:
        """Do nothing."""

    def reduced_gradient(self, primal: int, gradient: torch.Tensor) -> None:
        """Do nothing."""

    def share(self, primal: int) -> None:
        """Do nothing."""


class IgnoredReductions:
    """For rehearsals: nothing is sent."""

    def start(self, bucket: int, value: torch.Tensor, ends: Sequence[int] = ()) -> None:
        """Do nothing."""

    def wait(self, bucket: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Section:
    """One generated function between two cuts.

    Attributes:
        module: its `forward` takes one list, which it empties: the primals, if it is the first
            section, else the buffers that it takes; then the tangents, if it takes them; then
            helpers. It returns its results, then the buffers that it leaves.
        takes: buffers that earlier sections have left; primals among them.
        takes_tangents: the backward starts in it.
        num_results: how many results it returns.
        leaves: buffers for later sections.
        passes: of the buffers that it takes, those that later sections take as they are.
        overwrites: of the buffers that it takes, those in whose storage it puts others.
    """

    module: fx.GraphModule
    takes: tuple[int, ...]
    takes_tangents: bool
    num_results: int
    leaves: tuple[int, ...]
    passes: tuple[int, ...]
    overwrites: frozenset[int]


@dataclass(frozen=True)
class Program:
    """A step as functions that run one after the other.

    Attributes:
        sections: in order.
        helpers: what each section takes beside values, in order: out of "events", "tier",
            "streamed" and "reducer".
        slots: what the tier has to hold.
    """

    sections: tuple[Section, ...]
    helpers: tuple[str, ...]
    slots: tuple[SlotSpec, ...]
