"""Ranks that are not there: a step planned for any number of them, with a network as it would be.

The time of a reduction is that of a ring (Patarasuk and Yuan 2009): with N ranks, 2 (N - 1)
messages one after the other, each of 1/N of the bytes.

    seconds(bytes) = 2 (N - 1) * latency + 2 (N - 1) / N * bytes / bytes_per_second

Adding up pieces for their owners takes half of that, and so does gathering them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from packlight.errors import BudgetFormatError, OptionError
from packlight.ranks.link import NETWORK
from packlight.step import RANKS, Lane, Speed
from packlight.units import parse_bytes

# From one machine to the next, through a switch and two drivers.
TYPICAL_LATENCY_SECONDS = 2e-5


@dataclass(frozen=True)
class ModelledMesh:
    """Ranks for `packlight.plan`, which plans what one of them would do.

    Attributes:
        data: how many ranks have a part of the batch each.
        bytes_per_second: of each rank's link, in each direction.
        latency_seconds: from one rank to the next.

    >>> mesh = ModelledMesh(data=8, bytes_per_second=25e9)
    >>> f"{mesh.lane.reduce.seconds(10**9):.3f}"
    '0.070'
    """

    data: int
    bytes_per_second: float
    latency_seconds: float = TYPICAL_LATENCY_SECONDS

    def __post_init__(self) -> None:
        if self.data < 2 or self.bytes_per_second <= 0 or self.latency_seconds < 0:
            raise OptionError(
                f"a mesh of {self.data} ranks with links of {self.bytes_per_second:g} bytes per "
                f"second and a latency of {self.latency_seconds:g} s is none\nhint: it takes two "
                "ranks, and links with a speed"
            )

    @classmethod
    def parsed(cls, mesh: str, link: str) -> ModelledMesh:
        """Return the mesh that "data=8" and "25GB/s" stand for.

        Raises:
            OptionError: they stand for none.
        """
        match = re.fullmatch(r"data=(\d+)", mesh)
        if match is None:
            raise OptionError(f"--mesh {mesh} is no mesh of ranks\nhint: such as data=8")
        try:
            speed = parse_bytes(link.removesuffix("/s"))
        except BudgetFormatError:
            raise OptionError(f"--link {link} is no speed\nhint: such as 25GB/s") from None
        return cls(int(match[1]), float(speed))

    @property
    def lane(self) -> Lane:
        """The network."""
        half = self._speed(self.data - 1)
        return Lane(
            NETWORK, RANKS, read=half, write=None, reduce=self._speed(2 * (self.data - 1)),
            reduce_pieces=half, share=half,
        )

    def _speed(self, num_messages: int) -> Speed:
        return Speed(
            self.bytes_per_second * self.data / num_messages, num_messages * self.latency_seconds
        )
