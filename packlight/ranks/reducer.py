"""A running step's sums over all ranks: of its losses first, then of its gradients.

The loss of the whole batch is the weighted sum of the ranks' losses. Each sends its own as soon as
it has it; before the first gradient is used, all of them have to be there and finite. So a loss
that is NaN on one rank is the same error on all, with no parameter touched anywhere.
"""

from __future__ import annotations

import math
import time

import torch

from packlight.errors import NonFiniteLossError, RankError
from packlight.ranks.group import LOOK_SECONDS, SHORT_SLEEP_SECONDS, Ranks, Sent
from packlight.torch_internals.storages import num_storage_references

OK, FAILED, CAPTURED_AGAIN = 0.0, 1.0, 2.0


class OtherModelError(Exception):
    """Another rank's model changed since it was captured; nothing was updated."""


class Reducer:
    """Adds up what the ranks have, one step after the other (see `lower.program.Program`).

    Args:
        ranks: all of them.

    Attributes:
        weight: how much this rank's part of the batch counts, of 1 in all.
        num_steps: trained so far, for errors.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.weight, self.num_steps = 1.0, 0
        # Per rank: its weighted loss, and how it fares.
        self._losses = torch.zeros(ranks.size, 2, dtype=torch.float64)
        self._sent: Sent | None = None
        self._are_known = False
        self._under_way: dict[int, tuple[Sent, torch.Tensor, int]] = {}

    def begin(self, weight: float, num_steps: int) -> None:
        """Say what the next step is.

        Args:
            weight: how much this rank's part of the batch counts, of 1 in all.
            num_steps: trained so far.
        """
        self.weight, self.num_steps = weight, num_steps
        self._sent, self._are_known = None, False
        self._under_way.clear()

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
        for rank, (loss, status) in enumerate(self._losses.tolist()):
            if status == CAPTURED_AGAIN:
                raise OtherModelError
            if status == FAILED:
                raise RankError(
                    f"rank {rank} failed in step {self.num_steps + 1}; parameters and optimizer "
                    "are untouched\nhint: its own error says why", rank,
                )
            if not math.isfinite(loss):
                raise NonFiniteLossError(self.num_steps, loss, rank=rank)
        return math.fsum(loss for loss, _ in self._losses.tolist())

    def leave(self, error: BaseException, is_captured_again: bool = False) -> None:
        """Leave a step that began: the others are told in place of the loss, or at once."""
        if self._are_known or self._sent is not None:
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

    def start(self, bucket: int, value: torch.Tensor) -> None:
        """Start adding up a bucket in place: a tensor that fills its storage, in any layout."""
        if self.weight == 0.0:  # nothing in this part counts, its gradient may be 0/0
            value.zero_()
        # A tensor of its own, so that whoever else holds the storage is counted.
        references = num_storage_references(value)
        flat = value.as_strided((value.numel(),), (1,))
        self._under_way[bucket] = (self.ranks.start(flat), value, references)

    def wait(self, bucket: int) -> None:
        """Wait until a bucket's sums are there, and nobody but the step holds its memory."""
        if not self._are_known:
            self.total_loss()
        sent, value, references = self._under_way.pop(bucket)
        self.ranks.wait(sent)
        del sent
        # The thread that sent lets go of it a moment later: freed by it, it would be freed late.
        until = time.monotonic() + LOOK_SECONDS
        while value.device.type == "cpu" and num_storage_references(value) > references:
            if time.monotonic() > until:
                break
            time.sleep(SHORT_SLEEP_SECONDS)
