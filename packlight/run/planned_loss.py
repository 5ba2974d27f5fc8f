"""What runs in the place of a traced loss: its schedule, and new values of buffers written back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from packlight.lower.emit import emit
from packlight.lower.frame import Frame
from packlight.memory.tier import SlotSpec, Tier
from packlight.moves.stream.streamed import StreamedBuffers
from packlight.search.ready import ReadyPart
from packlight.updates.gradients import GradientFate, fills_storage


class PlannedLoss:
    """What runs in the place of a traced loss; called with the primals."""

    def __init__(
        self,
        part: ReadyPart,
        fate: GradientFate,
        streamed: StreamedBuffers,
        make_tier: Callable[[Sequence[SlotSpec]], Tier],
        talks: bool,
    ) -> None:
        self.program = emit(part.step, part.plan.schedule)
        self.fate, self.captured, self.streamed = fate, part.traced.loss, streamed
        self.tier = make_tier(self.program.slots) if self.program.slots else None
        same_as_primal = part.traced.loss.same_as_primal
        self.returned = [(i, same_as_primal.get(i)) for i in part.traced.loss.returned]
        (tangent,) = part.step.joint.tangents
        like = tangent.meta["val"]
        self.weight = torch.ones((), device=like.device, dtype=like.dtype)
        self.backup: dict[torch.Tensor, torch.Tensor] | None = None
        # With other ranks before their losses are known.
        self.talks = talks

    def reset(self) -> None:
        """Forget transfers under way, after a failed step."""
        if self.tier is not None:
            self.tier.reset()

    def set_up(
        self,
        weight: float,
        num_steps: int,
        microbatch_index: int | None,
        backup: dict[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Say what the next call is.

        Args:
            weight: what the backward starts from, how much the loss counts.
            num_steps: trained so far.
            microbatch_index: which microbatch, None for a whole batch.
            backup: takes the first values of what is written back.
        """
        # An infinite weight in half precision is the scaler's business: it skips the update.
        self.weight.copy_(torch.tensor(weight, dtype=torch.float64))
        self.backup = backup
        self.fate.num_steps, self.fate.microbatch_index = num_steps, microbatch_index

    def __call__(self, primals: Sequence[Any]) -> tuple[Any, ...]:
        """Run the schedule, write new values of the model's buffers back.

        Returns:
            The loss, and what the forward assigns to attributes, in dynamo's order.
        """
        if self.talks:
            assert self.fate.reducer is not None, "there are other ranks"
            self.fate.reducer.enter()
        with torch.no_grad(), torch.amp.autocast(self.weight.device.type, enabled=False):
            helpers = {
                "events": self.fate, "tier": self.tier, "streamed": self.streamed,
                "reducer": self.fate.reducer,
            }
            results = [*Frame(self.program, helpers).run([*primals, self.weight])]
            loss = results[self.captured.loss_index]
            if not fills_storage(loss):  # an elementwise loss's has room for every element
                results[self.captured.loss_index] = loss.clone()
            del loss
            for result, primal in self.captured.written_back.items():
                written = primals[primal]
                if self.backup is not None and written not in self.backup:
                    self.backup[written] = written.clone()
                written.copy_(results[result])
        return tuple(
            results[i] if primal is None else primals[primal] for i, primal in self.returned
        )
