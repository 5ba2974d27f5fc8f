"""Runs a prepared training step: microbatches, write-backs, and what is left of the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from packlight.capture.whole_step import Consumption
from packlight.runtime.gradients import GradientFate, update_all
from packlight.runtime.prepare import Part, Preparer, Way
from packlight.runtime.program import emit_program


class StepRunner:
    """A way to run the step, ready to be called with batches of one signature.

    Attributes:
        way: how the step runs.
    """

    def __init__(self, preparer: Preparer, way: Way) -> None:
        self.way = way
        self._request = preparer.request
        self._updates = None if preparer.no_update_in_backward else preparer.updates
        self._weight = torch.ones(())
        self._fates: list[GradientFate] = []
        for part in way.parts:
            in_backward = self._updates if way.consumption is Consumption.UPDATE else None
            fate = GradientFate(
                part.parameter_of, part.captured.loss_index, preparer.request.clipping, in_backward
            )
            self._fates.append(fate)
            part.capture.install(_Program(self, part, fate))

    def run(self, batch: Any, num_steps: int) -> torch.Tensor:
        """Train one step and return the detached loss."""
        optimizer = self._request.optimizer
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        for fate in self._fates:
            fate.num_steps = num_steps
        if self.way.consumption is Consumption.UPDATE:
            assert self._updates is not None
            self._updates.begin_step()
        self._set_weight(1.0)
        try:
            loss = self.way.parts[0].capture(batch)
        except BaseException:
            optimizer.zero_grad(set_to_none=True)
            raise
        if self.way.consumption is not Consumption.UPDATE:
            update_all(optimizer, self._request.clipping, self._request.scaler, self._updates)
        return loss

    def _set_weight(self, weight: float) -> None:
        scaler = self._request.scaler
        self._weight.fill_(weight if scaler is None else weight * scaler.get_scale())

    @property
    def weight(self) -> torch.Tensor:
        """What the backward starts from: how much the loss counts."""
        return self._weight


class _Program:
    """What runs in the place of a traced loss; called with the primals."""

    def __init__(self, runner: StepRunner, part: Part, fate: GradientFate) -> None:
        self.module: fx.GraphModule = emit_program(part.step, part.plan.schedule)
        self.runner, self.fate, self.captured = runner, fate, part.captured
        (tangent,) = part.step.joint.tangents
        self.tangent = tangent.meta["val"]

    def __call__(self, primals: Sequence[Any]) -> torch.Tensor:
        """Run the schedule, write new values of the model's buffers back, return the loss."""
        device, dtype = self.tangent.device, self.tangent.dtype
        weight = self.runner.weight.to(device, dtype)
        with torch.no_grad(), torch.amp.autocast(device.type, enabled=False):
            results = self.module.forward([*primals, weight, self.fate])
            for result, primal in self.captured.written_back.items():
                primals[primal].copy_(results[result])
        loss: torch.Tensor = results[self.captured.loss_index]
        return loss
