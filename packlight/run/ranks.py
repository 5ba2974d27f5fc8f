"""What a step of several ranks does beside its schedule: weights, and accumulated gradients."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from packlight.errors import RankError
from packlight.lower.reductions import layout_like, slots
from packlight.moves.microbatch.denominator import Denominator, Measure
from packlight.moves.microbatch.split import measured, weights_of
from packlight.ranks.group import Ranks
from packlight.ranks.pieces import segments
from packlight.ranks.reducer import Reducer
from packlight.ranks.sharded import ShardedParameters
from packlight.run.signature import Signature
from packlight.search.ready import Ready

# Words in the place of a signature's digest.
FAILED, CHANGED = 0, 1


def agreed_signature(
    ranks: Ranks | None, look: Callable[[], tuple[Signature, bool]]
) -> tuple[Any, Signature, bool]:
    """Return what the batches of all ranks look like, this rank's, and whether any model changed.

    The first and the last are the same on all ranks.

    Args:
        ranks: all of them; None where this process is alone.
        look: returns what this rank's batch looks like, and whether its model changed.

    Raises:
        Exception: what `look` raises on one rank, on all.
    """
    if ranks is None:
        alone, has_changed = look()
        return alone, alone, has_changed
    error: Exception | None = None
    signature: Signature | None = None
    word, has_changed = FAILED, False
    try:
        signature, has_changed = look()
        digest = hashlib.sha256(repr(signature).encode()).digest()
        # An int64 that is no other word.
        word = CHANGED + 1 + int.from_bytes(digest[:7], "big")
    except Exception as raised:
        error = raised
    words = ranks.exchange(CHANGED if has_changed else word)
    if FAILED in words:

        def fail() -> None:
            if error is not None:
                raise error

        ranks.gather(fail)
    if CHANGED in words:
        words, has_changed = ranks.exchange(word), True
    assert signature is not None, "a rank that failed has raised"
    return words, signature, has_changed


def agreed_place(ranks: Ranks, place: int | None) -> int | None:
    """Return which of the known plans all ranks need; None where they need another one."""
    words = {*ranks.exchange(0 if place is None else place + 1)}
    (word, *others) = words
    return None if others or word == 0 else word - 1


class RankWeights:
    """How much each rank's part of a batch counts, so that all count as one device's batch would.

    Args:
        ranks: all of them.
        ready: with what the loss divides by.
    """

    def __init__(self, ranks: Ranks, ready: Ready) -> None:
        assert ready.rank_weight is not None, "ranks are weighed by what their loss divides by"
        self._ranks, self._weight, self._like = ranks, ready.rank_weight, ready.rank_measure
        # Rows are part of the signature that the step was planned for.
        is_fixed = self._weight in ("rows", "sum") or (
            isinstance(self._weight, Denominator) and not self._weight.terms
        )
        self._fixed = self._exchanged(self._numbers(self._like)) if is_fixed else None

    def of_this_rank(self, batch: Any) -> float:
        """Return the weight of this rank's part.

        Raises:
            MicrobatchError: there are no right weights for these parts.
            RankError: another rank cannot say how much its part counts.
        """
        if self._fixed is not None:
            return self._fixed
        error: Exception | None = None
        numbers = [math.nan] * len(self._numbers(self._like))
        try:
            numbers = self._numbers(measured(self._weight, batch))
        except Exception as raised:
            error = raised
        try:
            return self._exchanged(numbers)
        except RankError:
            if error is not None:
                raise error from None
            raise

    def _numbers(self, measure: Measure | float) -> list[float]:
        return measure.numbers if isinstance(measure, Measure) else [measure]

    def _exchanged(self, numbers: Sequence[float]) -> float:
        everybody = self._ranks.exchange_numbers(numbers)
        for rank, theirs in enumerate(everybody):
            if any(map(math.isnan, theirs)):
                raise RankError(
                    f"rank {rank} cannot say how much its part of the batch counts", rank
                )
        like = self._like
        parts = [like.with_numbers(n) if isinstance(like, Measure) else n[0] for n in everybody]
        return weights_of(self._weight, parts)[self._ranks.rank]


class Accumulated:
    """Gradients that are added up over microbatches where all ranks then add them up.

    Args:
        buckets: parameters whose gradients are reduced together.
        reducer: adds up over ranks.
        sharded: parameters in pieces, of whose sums each rank takes its own rows.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[nn.Parameter]],
        reducer: Reducer,
        sharded: ShardedParameters | None = None,
    ) -> None:
        self._buckets, self._reducer, self._sharded = buckets, reducer, sharded
        self._bucket_of = {p: index for index, bucket in enumerate(buckets) for p in bucket}
        self._flat: dict[int, torch.Tensor] = {}
        self._places: dict[nn.Parameter, torch.Tensor] = {}

    def place_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return where a parameter's gradient is; its bucket is made when that is first asked."""
        index = self._bucket_of[parameter]
        if index not in self._flat:
            bucket = self._buckets[index]
            size = sum(p.numel() for p in bucket)
            flat = self._flat[index] = bucket[0].new_zeros(size)
            layouts = [layout_like(p) for p in bucket]
            self._places.update(zip(bucket, slots(flat, layouts), strict=True))
        return self._places[parameter]

    def reduce(self) -> None:
        """Have all gradients be those of all ranks."""
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket:
                self._set_gradient(parameter)
            self._reducer.start(index, self._flat[index], self._ends(bucket))
        for index in range(len(self._buckets)):
            self._reducer.wait(index)

    def _set_gradient(self, parameter: nn.Parameter) -> None:
        place = self.place_of(parameter)  # in this rank's part nothing may have counted
        if self._sharded is None or parameter not in self._sharded:
            parameter.grad = place
            return
        parameter.grad = None
        first, end = self._sharded.own_rows(parameter)
        with self._sharded.own(parameter):
            parameter.grad = place[first:end] if end > first else None

    def _ends(self, bucket: Sequence[nn.Parameter]) -> tuple[int, ...]:
        """Return where ranks' parts of a bucket end; none where they do not lie together."""
        if self._sharded is None or len(bucket) > 1 or bucket[0] not in self._sharded:
            return ()
        return segments([self._sharded.pieces_of(bucket[0])])

    def clear(self) -> None:
        """Let go of all of it."""
        self._flat.clear()
        self._places.clear()
