"""How gradients are added up over ranks, and what that costs beside the network's time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from packlight.capture.reduced import Reductions
from packlight.costs.measure import median_seconds
from packlight.costs.profiler import CallProfiler
from packlight.moves.sharding import Sharding
from packlight.step import Lane

COPIED_BYTES = 32 * 2**20  # enough to fill caches


@dataclass(frozen=True)
class Reduction:
    """How gradients are added up over ranks.

    Attributes:
        buckets: names of the parameters whose gradients are reduced together, in order.
        num_in_flight: how many buckets may be under way before updates wait; None for all.
        lane: the network.
        sharding: parameters that lie in pieces, whose sums go to whoever has the rows.
        rank: this one.
        sums_each: what microbatches leave is added up over ranks one by one, so that each rank
            accumulates its own part alone; else what they have accumulated is, once.
    """

    buckets: tuple[tuple[str, ...], ...]
    num_in_flight: int | None
    lane: Lane
    sharding: Sharding = field(default_factory=Sharding)
    rank: int = 0
    sums_each: bool = False

    @property
    def share_seconds(self) -> float:
        """How long all ranks take to share the rows that they have updated."""
        if self.lane.share is None:
            return 0.0
        return sum(self.lane.share.seconds(p.nbytes) for p in self.sharding.shared)


class ReductionCosts:
    """What reductions of a model's gradients cost.

    Args:
        trained: the parameters.
        name_of: their names, by id.
        device: where they are.
    """

    def __init__(
        self, trained: Iterable[nn.Parameter], name_of: Mapping[int, str], device: torch.device
    ) -> None:
        self._size_of = {name_of[id(p)]: p.nbytes for p in trained}
        self._name_of, self._device = name_of, device
        self._copy_seconds: float | None = None

    def of(
        self, reduction: Reduction, trained: Mapping[int, nn.Parameter], profiler: CallProfiler
    ) -> Reductions:
        """Return how the gradients of a captured call are reduced.

        Args:
            reduction: how those of the model are.
            trained: the parameters among the call's inputs, by position.
            profiler: remembers seconds.
        """
        primal_of = {self._name_of[id(p)]: primal for primal, p in trained.items()}
        return Reductions(
            tuple(tuple(primal_of[name] for name in names) for names in reduction.buckets),
            reduction.num_in_flight,
            reduction.lane,
            lambda num_bytes: num_bytes * self._seconds_per_byte(profiler),
            {
                primal: reduction.sharding.pieces[parameter]
                for primal, parameter in trained.items()
                if parameter in reduction.sharding
            },
            reduction.rank,
            frozenset(
                primal for primal, p in trained.items()
                if p in reduction.sharding and p not in reduction.sharding.gathered
            ),
            reduction.sharding.keeps_gradients,
        )

    def finish_seconds(self, reduction: Reduction, profiler: CallProfiler) -> float:
        """Return how long accumulated gradients take to be reduced, one bucket after the other."""
        assert reduction.lane.reduce is not None
        sizes = [sum(self._size_of[name] for name in names) for names in reduction.buckets]
        seconds = sum(sizes) * self._seconds_per_byte(profiler)  # the first microbatch's copies
        return seconds + sum(map(reduction.lane.reduce.seconds, sizes))

    def _seconds_per_byte(self, profiler: CallProfiler) -> float:
        """Return how long copies take."""
        if self._copy_seconds is None:
            source = torch.ones(COPIED_BYTES // 4, device=self._device)
            target = torch.empty_like(source)
            seconds = median_seconds(lambda: target.copy_(source), self._device)
            seconds = profiler.remembered_seconds("copy of a bucket", self._device, seconds)
            self._copy_seconds = seconds / source.nbytes
        return self._copy_seconds
