"""Which memory buffers go to: a directory's disk, or the host's where the step runs on a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from packlight.errors import OffloadError
from packlight.memory.disk import DiskTier
from packlight.memory.host import HostTier
from packlight.memory.tier import SlotSpec, Tier


@dataclass(frozen=True)
class FarMemory:
    """A memory in which there can be tiers.

    Attributes:
        directory: on whose disk they are; None for pinned memory of the host.
    """

    directory: Path | None = None

    def make_tier(self, slots: Sequence[SlotSpec]) -> Tier:
        """Return a new tier.

        Raises:
            OffloadError: there is no room, or the directory is of no use.
        """
        if self.directory is None:
            return HostTier(slots)
        return DiskTier(self.directory, slots)


def far_memory(
    device: torch.device, directory: str | os.PathLike[str] | None
) -> FarMemory | None:
    """Return where buffers of a device go, None if they have nowhere to go.

    Raises:
        OffloadError: a directory is named for buffers of a GPU.
    """
    if device.type == "cpu":
        return None if directory is None else FarMemory(Path(directory))
    if directory is not None:
        raise OffloadError(
            f"buffers of {device} are offloaded to the host's memory, not to {directory}",
            directory=str(directory),
            hint="leave offload_directory out",
        )
    return FarMemory()
