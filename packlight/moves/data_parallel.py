"""The move: each rank has its part of the batch, and gradients are added up over all of them.

Synchronous data parallel training (DDP: Li et al. 2020, arXiv 2006.15704) as operations of the
planned step. The gradients of a bucket are added up as soon as all of them are complete, and
updates wait for that. How large buckets are and how many may be under way is a setting: the
schedule around it, and what it costs in bytes and seconds, is the planner's as everything else.

The bits are those of DDP with the same buckets, where ranks count the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

from torch import fx, nn

from packlight.capture.whole_step import Consumption
from packlight.errors import BatchError, MicrobatchError, UnsupportedModelError, WayError
from packlight.moves.draft import Draft
from packlight.moves.microbatch.independence import alternatives
from packlight.moves.microbatch.move import observed_weight, open_weight
from packlight.moves.microbatch.split import LossWeight
from packlight.moves.move import Effect, Move, Refusal, Room, Stage
from packlight.moves.reduction import Reduction
from packlight.moves.sharding import Sharding
from packlight.ranks.pieces import Placement
from packlight.step import Machine, Speed
from packlight.units import format_bytes

# Sizes of buckets, by how much longer they take than their latency (large ones hide it, small ones
# hold less in memory), and how many may be under way, None for all: the fastest setting first.
LARGE, SMALL, ONE_BY_ONE = 16.0, 3.0, 0.0
SETTINGS: tuple[tuple[float, int | None], ...] = (
    (LARGE, None), (LARGE, 2), (LARGE, 0), (SMALL, 0), (ONE_BY_ONE, 0),
)
# Of a bucket's size: gradients from there on are reduced alone, where they are.
ALONE = 1 / 4


@dataclass(frozen=True)
class DataParallel(Move):
    """Gradients of all ranks are added up, bucket by bucket.

    Attributes:
        buckets: names of the parameters whose gradients are reduced together, in order.
        num_in_flight: how many buckets may be under way before updates wait; None for all.
        weight_index: which of the denominators that the loss's graph leaves open weighs the parts.
        in_pieces: names of the parameters that lie in pieces with all ranks.
        gathered: those of them whose values do, too, and are gathered around their uses.
        keeps_gradients: gradients stay whole until they are used up.
        sums_each: with those, gradients of microbatches are added up over ranks one by one and
            accumulated by whoever has the rows; else they are accumulated whole, and added up once.
    """

    name: ClassVar[str] = "data-parallel"
    effect: ClassVar[Effect] = Effect.SAME_BITS  # as DDP: the sums over ranks are what is asked for
    stage: ClassVar[Stage] = Stage.PLACEMENT

    buckets: tuple[tuple[str, ...], ...]
    num_in_flight: int | None = None
    weight_index: int = 0
    in_pieces: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    keeps_gradients: bool = False
    sums_each: bool = False

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[DataParallel | Refusal]:
        """Yield ever fewer bytes under way until the plain step fits; then what did best so far."""
        costs = draft.costs
        if draft.request.num_ranks is None:
            return
        assert costs.network is not None and costs.network.reduce is not None
        index = draft.asked(settled_weight)
        best = min(room.found, key=lambda moves: room.found[moves].seconds, default=())
        made = next((move for move in best if isinstance(move, cls)), None)
        if made is not None:  # rewriting a graph hardly changes which setting is best
            yield made
            return
        sharding = sharding_of(draft)
        in_pieces = costs.names(sharding.pieces)
        for gathered, keeps_gradients in _placements(draft, sharding):
            for size, count, sums_each in _settings(draft, bool(in_pieces), keeps_gradients):
                size_bytes = _bytes_in(costs.network.reduce, size)
                buckets = costs.agreed_buckets or _buckets(draft, size_bytes, frozenset(in_pieces))
                yield cls(
                    buckets, count, index, in_pieces, costs.names(gathered), keeps_gradients,
                    sums_each,
                )
                if room.has_plain:
                    return

    def apply(self, draft: Draft) -> Draft:
        """Return the draft whose gradients are reduced before they are consumed."""
        lane = draft.costs.network
        assert lane is not None, "the network is measured before anything is planned"
        sharding = sharding_of(draft)
        found = draft.costs.names(sharding.pieces)
        if found != self.in_pieces:
            raise WayError(
                "set of parameters in pieces", f"{len(self.in_pieces)} parameters",
                f"{len(found)}", "every rank has to look at its parameters' memory as the others do"
            )
        gathered = {*self.gathered}
        values = (p for p, name in zip(sharding.pieces, found, strict=True) if name in gathered)
        sharding = replace(
            sharding.with_values(values), keeps_gradients=self.keeps_gradients
        )
        if not sharding.gathered:
            lane = replace(lane, memory="", read=None)
        ranks = draft.request.shard_ranks
        machine = (draft.machine or Machine()).with_lane(lane)
        reduction = Reduction(
            self.buckets, self.num_in_flight, lane, sharding, 0 if ranks is None else ranks.rank,
            self.sums_each,
        )
        return draft.changed(reduction=reduction, machine=machine)

    def describe(self, draft: Draft) -> str:
        """Return over how many ranks, in how many buckets."""
        flying = "" if self.num_in_flight is None else f", {self.num_in_flight} of them under way"
        num = draft.request.num_ranks
        words = f"gradients of {num} ranks reduced in {len(self.buckets)} buckets{flying}"
        if not self.in_pieces:
            return words
        gathers = {*self.gathered}
        values = [p for p in sharding_of(draft).pieces if draft.costs.name_of[id(p)] in gathers]
        size = format_bytes(sum(p.nbytes for p in values))
        gathered = f", {size} of {len(self.gathered)} gathered in turn" if self.gathered else ""
        return f"{len(self.in_pieces)} parameters in pieces{gathered}, {words}"

    def loss_weight(self, whole: Draft) -> LossWeight:
        """Return what weighs the ranks' losses.

        Args:
            whole: the draft of this rank's whole batch.
        """
        return alternatives(open_weight(whole))[self.weight_index]


def settled_weight(whole: Draft) -> int:
    """Return which denominator holds; what the user says does.

    Raises:
        MicrobatchError: the whole batch's loss is not known to be a weighted sum of the parts'.
    """
    request, weight = whole.request, open_weight(whole)
    options = alternatives(weight)
    if request.loss_weight is not None or request.is_weightless:
        return 0
    try:
        return observed_weight(whole, weight, cuts_extras=False)
    except BatchError as error:  # one row cannot be compared with its parts
        if len(options) == 1:
            return 0
        raise MicrobatchError(f"a mean cannot be told from a sum: {error}") from error


def _placements(
    draft: Draft, sharding: Sharding
) -> Iterator[tuple[Sequence[nn.Parameter], bool]]:
    """Yield which parameters' values lie in pieces, and whether gradients stay whole.

    Ever more of them where both is possible: the largest half of what there is before all.
    """
    placements, parameters = draft.request.placements, [*sharding.pieces]
    if Placement.PARAMETER not in placements:
        yield (), Placement.STATE in placements
        return
    if Placement.GRADIENT in placements:
        yield (), False
        by_size = sorted(parameters, key=lambda p: -p.nbytes)
        sizes = [*accumulate(p.nbytes for p in by_size)]
        num = bisect_left(sizes, sizes[-1] / 2) + 1 if sizes else 0
        half = {*by_size[:num]}
        yield [p for p in parameters if p in half], False
    yield parameters, False


def _settings(
    draft: Draft, is_in_pieces: bool, keeps_gradients: bool
) -> list[tuple[float, int | None, bool]]:
    """Return sizes of buckets, how many are under way, and whether each microbatch's are summed."""
    accumulates = draft.gradients is Consumption.ACCUMULATE
    # Of what was reduced, before the last of it is.
    lets_go = draft.gradients is Consumption.UPDATE or (is_in_pieces and not keeps_gradients)
    settings: list[tuple[float, int | None, bool]] = []
    if accumulates or not lets_go:
        settings += [(LARGE, None, False), (ONE_BY_ONE, None, False)]
    if lets_go:
        settings += [(*setting, accumulates) for setting in SETTINGS]
    return settings


def _bytes_in(speed: Speed, times: float) -> int:
    """Return the bytes that take so many times as long as their latency."""
    return max(1, int(times * speed.latency_seconds * speed.bytes_per_second))


def sharding_of(draft: Draft) -> Sharding:
    """Return which parameters lie in pieces with all ranks, where that is asked for.

    Raises:
        UnsupportedModelError: parameters cannot be updated one by one.
    """
    request, costs = draft.request, draft.costs
    if not request.shards:
        return Sharding()
    whole = draft.whole or draft

    def found() -> Sharding:
        if not costs.steps_one_by_one:
            updates = costs.updates
            reason = "there is no optimizer" if updates is None else updates.refusal
            raise UnsupportedModelError(
                f"parameters cannot lie in pieces: {reason}\nhint: leave shard= out"
            )
        assert request.num_shards is not None
        return costs.sharding(whole.loss, request.num_shards)

    return whole.once("sharding", found)


def _buckets(
    draft: Draft, bucket_bytes: int, in_pieces: Set[str]
) -> tuple[tuple[str, ...], ...]:
    """Return buckets of about a size, in the order in which they are complete.

    Args:
        draft: whose gradients.
        bucket_bytes: a bucket is closed when it has as many.
        in_pieces: names of parameters whose gradients are no others' company.
    """
    loss, costs = draft.loss, draft.costs
    module = draft.graph_module
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    results = module.graph.find_nodes(op="output")[0].args[0][loss.num_forward_outputs :]
    gradients = [
        (place[node], costs.name_of[id(parameter)], node.meta["val"])
        for primal, parameter in costs.parameters(loss.arguments).items()
        if isinstance(node := results[primal], fx.Node)
    ]
    done: list[_Open] = []
    pending: dict[Any, _Open] = {}
    for when, name, value in sorted(gradients, key=lambda gradient: gradient[0]):
        size = value.numel() * value.itemsize
        if size >= ALONE * bucket_bytes:
            done.append(_Open((name,), size, when))
            continue
        kind = value.dtype, value.device, name in in_pieces
        before = pending.pop(kind, _Open((), 0, when))
        bucket = replace(before, names=(*before.names, name), size=before.size + size, last=when)
        if bucket.size >= bucket_bytes:
            done.append(bucket)
        else:
            pending[kind] = bucket
    return tuple(b.names for b in sorted([*done, *pending.values()], key=lambda b: b.last))


@dataclass(frozen=True)
class _Open:
    """A bucket that is being filled: names, bytes, and when the last of it is complete."""

    names: tuple[str, ...]
    size: int
    last: int
