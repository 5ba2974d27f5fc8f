"""Ranks that are not there: a step planned for any number of them, with a network as it would be.

The time of a reduction is that of a ring (Patarasuk and Yuan 2009): with N ranks, 2 (N - 1)
messages one after the other, each of 1/N of the bytes.

    seconds(bytes) = 2 (N - 1) * latency + 2 (N - 1) / N * bytes / bytes_per_second

Adding up pieces for their owners takes half of that, and so does gathering them. In hybrid sharding
that is done within groups of ranks, and owners of the same pieces in all groups add those up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from packlight.errors import BudgetFormatError, OptionError
from packlight.ranks.link import NETWORK, in_groups
from packlight.ranks.parallel import Parallel
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
        shard: how many ranks share the pieces of parameters, where all along `data` have them anew:
            there are so many times more ranks.
        shard_bytes_per_second: of links between those; the same if None.

    >>> mesh = ModelledMesh(data=8, bytes_per_second=25e9)
    >>> f"{mesh.lane.reduce.seconds(10**9):.3f}"
    '0.070'
    """

    data: int
    bytes_per_second: float
    latency_seconds: float = TYPICAL_LATENCY_SECONDS
    shard: int | None = None
    shard_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        speeds = (self.bytes_per_second, self.shard_bytes_per_second or self.bytes_per_second)
        if min(self.data, self.shard or 2) < 2 or min(speeds) <= 0 or self.latency_seconds < 0:
            raise OptionError(
                f"a mesh of {self.num_ranks} ranks with links of {self.bytes_per_second:g} bytes "
                f"per second and a latency of {self.latency_seconds:g} s is none\n"
                "hint: it takes two ranks, and links with a speed"
            )

    @classmethod
    def parsed(cls, mesh: str, link: str) -> ModelledMesh:
        """Return the mesh that "data=8" and "25GB/s", or "data=64,shard=8" stand for.

        Links within groups that share pieces may be others: "25GB/s,shard=200GB/s".

        Raises:
            OptionError: they stand for none.
        """
        match = re.fullmatch(r"data=(\d+)(?:,shard=(\d+))?", mesh)
        if match is None:
            raise OptionError(
                f"--mesh {mesh} is no mesh of ranks\nhint: such as data=8, or data=64,shard=8"
            )
        across, _, within = link.partition(",shard=")
        try:
            speed = float(parse_bytes(across.removesuffix("/s")))
            other = float(parse_bytes(within.removesuffix("/s"))) if within else None
        except BudgetFormatError:
            raise OptionError(f"--link {link} is no speed\nhint: such as 25GB/s") from None
        shard = None if match[2] is None else int(match[2])
        return cls(int(match[1]), speed, shard=shard, shard_bytes_per_second=other)

    def check(self, parallel: Parallel | None) -> None:
        """Raise where what the dimensions are for does not fit them."""
        is_hybrid = parallel is not None and parallel.is_hybrid
        if is_hybrid is not (self.shard is not None):
            raise OptionError(
                "a modelled mesh has a dimension shard= where ranks along data= have the same "
                "pieces\nhint: ModelledMesh(data=64, shard=8, ...) and packlight.Parallel("
                "data='data', shard='shard'), or neither"
            )

    @property
    def num_ranks(self) -> int:
        """How many have a part of the batch each."""
        return self.data * (self.shard or 1)

    @property
    def lane(self) -> Lane:
        """The network."""
        everybody = self._ring(self.num_ranks, self.bytes_per_second)
        if self.shard is None:
            return everybody
        within = self._ring(self.shard, self.shard_bytes_per_second or self.bytes_per_second)
        across = self._ring(self.data, self.bytes_per_second)
        return in_groups(everybody, within, across, self.shard)

    def _ring(self, size: int, bytes_per_second: float) -> Lane:
        whole, half = (
            Speed(bytes_per_second * size / num, num * self.latency_seconds)
            for num in (2 * (size - 1), size - 1)
        )
        return Lane(
            NETWORK, RANKS, read=half, write=None, reduce=whole, reduce_pieces=half, share=half
        )
