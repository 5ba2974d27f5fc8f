"""A running step's sums over all ranks: of its losses first, then of its gradients.

The loss of the whole batch is the weighted sum of the ranks' losses. Each sends its own as soon as
it has it; before the first gradient is used, all of them have to be there and finite. So a loss
that is NaN on one rank is the same error on all, with no parameter touched anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from packlight.errors import NonFiniteLossError, RankError
from packlight.ranks.group import Ranks, Sent
from packlight.torch_internals.storages import num_storage_references

OK, FAILED, CAPTURED_AGAIN = 0.0, 1.0, 2.0


class OtherModelError(Exception):
    """Another rank's model changed since it was captured; nothing was updated."""


class Reducer:
    """Adds up what the ranks have, one step after the other (see `lower.program.Program`).

    Args:
        ranks: all of them.
        within: those that share the pieces of parameters, where these are not all.
        across: those with the same pieces, where there are several.

    Attributes:
        weight: how much this rank's part of the batch counts, of 1 in all.
        counts: whether the microbatch that runs does; where parameters lie in pieces all ranks run
            as many, and some of them for the others alone.
        num_steps: trained so far, for errors.
    """

    def __init__(
        self, ranks: Ranks, within: Ranks | None = None, across: Ranks | None = None
    ) -> None:
        self.ranks, self._within, self._across = ranks, within or ranks, across
        self.weight, self.num_steps = 1.0, 0
        self.counts = True
        # Per rank: its weighted loss, and how it fares.
        self._losses = torch.zeros(ranks.size, 2, dtype=torch.float64)
        self._sent: Sent | None = None
        self._are_known = self._has_entered = False
        self._under_way: dict[int, tuple[list[Sent], torch.Tensor, int]] = {}
        # Of buckets in pieces that other ranks have, too: this rank's part of their sums.
        self._own: dict[int, torch.Tensor] = {}

    def begin(self, weight: float, num_steps: int) -> None:
        """Say what the next step is.

        Args:
            weight: how much this rank's part of the batch counts, of 1 in all.
            num_steps: trained so far.
        """
        self.weight, self.num_steps = weight, num_steps
        self.counts = True
        self._sent, self._are_known, self._has_entered = None, False, False
        self._under_way.clear()
        self._own.clear()

    def enter(self) -> None:
        """Wait until all ranks run the step: before anything is gathered from them for it.

        Raises:
            RankError: another rank failed before.
            OtherModelError: it has to be captured again.
        """
        if self._has_entered:  # with an earlier microbatch
            return
        self._send(0.0, OK)
        assert self._sent is not None
        self.ranks.wait(self._sent)
        self._are_known = True  # how all of them fare
        self._refuse_failures()
        self._sent, self._are_known, self._has_entered = None, False, True

    # -- losses

    def give_loss(self, loss: float) -> None:
        """Tell the others this rank's loss."""
        self._send(loss * self.weight if self.weight else 0.0, OK)

    def _send(self, loss: float, status: float) -> None:
        self._losses.zero_()
        self._losses[self.ranks.rank, 0] = loss
        self._losses[self.ranks.rank, 1] = status
        self._sent = self.ranks.start(self._losses)

    def total_loss(self) -> float:
        """Return the whole batch's loss.

        Raises:
            NonFiniteLossError: it is not finite; on all ranks.
            RankError: another rank failed before it had one.
            OtherModelError: it has to be captured again.
        """
        if not self._are_known:
            assert self._sent is not None, "a step's loss is known before its gradients"
            self.ranks.wait(self._sent)
            self._are_known = True
        self._refuse_failures()
        for rank, (loss, _) in enumerate(self._losses.tolist()):
            if not math.isfinite(loss):
                raise NonFiniteLossError(self.num_steps, loss, rank=self.ranks.numbers[rank])
        return math.fsum(loss for loss, _ in self._losses.tolist())

    def _refuse_failures(self) -> None:
        for rank, (_, status) in enumerate(self._losses.tolist()):
            if status == CAPTURED_AGAIN:
                raise OtherModelError
            if status == FAILED:
                number = self.ranks.numbers[rank]
                raise RankError(
                    f"rank {number} failed in step {self.num_steps + 1}; parameters and optimizer "
                    "are untouched\nhint: its own error says why", number,
                )

    def leave(self, error: BaseException, is_captured_again: bool = False) -> None:
        """Leave a step that began: the others are told in place of the loss, or at once."""
        if self._are_known or self._sent is not None or self._has_entered:
            if not self._are_known or not self._is_everybodys(error):
                self.ranks.fail(error)
            return
        try:
            self._send(0.0, CAPTURED_AGAIN if is_captured_again else FAILED)
            assert self._sent is not None
            self.ranks.wait(self._sent)
        except RankError:  # others are gone, too
            pass

    def _is_everybodys(self, error: BaseException) -> bool:
        """Whether all ranks raise an error at the same place."""
        return isinstance(error, (NonFiniteLossError, RankError, OtherModelError))

    # -- gradients

    def start(self, bucket: int, value: torch.Tensor, ends: Sequence[int] = ()) -> None:
        """Start adding up a bucket in place.

        Args:
            bucket: its number.
            value: a tensor that fills its storage, in any layout.
            ends: where each rank's part of it ends, in elements, if each is to have its own alone.
        """
        # Where nothing in this part counts, its gradient may be 0/0.
        if self.weight == 0.0 or not self.counts:
            value.zero_()
        # A tensor of its own, so that whoever else holds the storage is counted.
        references = num_storage_references(value)
        flat = value.as_strided((value.numel(),), (1,))
        if ends:
            parts = [flat[a:b] for a, b in zip((0, *ends), ends, strict=False)]
            sent = [
                self._within.start_for(part, owner)
                for owner, part in enumerate(parts) if part.numel()
            ]
            if self._across is not None:
                self._own[bucket] = parts[self._within.rank]
        else:
            sent = [self.ranks.start(flat)]
        self._under_way[bucket] = (sent, value, references)

    def wait(self, bucket: int) -> None:
        """Wait until a bucket's sums are there, and nobody but the step holds its memory.

        All losses have to be finite before, but for those of microbatches, which are known later:
        nothing is updated until then.
        """
        if self._sent is not None and not self._are_known:
            self.total_loss()
        sent, value, references = self._under_way.pop(bucket)
        while sent:
            self.ranks.wait(sent.pop(0))
        own = self._own.pop(bucket, None)
        if own is not None and own.numel():
            assert self._across is not None
            self.ranks.wait(self._across.start(own))
        del own
        self.ranks.wait_let_go(value, references)
