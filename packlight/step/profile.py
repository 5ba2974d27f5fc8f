"""What a whole training step holds besides what a schedule allocates; where that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from packlight.step.machine import Machine
from packlight.step.types import StepGraph


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of a training step outside of the schedule.

    Attributes:
        parameter_bytes: the model's parameters.
        state_bytes: the model's buffers (batch-norm statistics and the like).
        input_bytes: the batch.
        optimizer_bytes: optimizer state, counted in full even before the first step creates it.
        update_workspace_bytes: the most that an update after the last schedule allocates for a
            moment; 0 where the updates are part of the schedule.
        gradient_bytes: gradients of the parameters, all together. Where the updates are part of the
            schedule, so are the gradients.
        accumulated_bytes: what gradients of several microbatches or batches are added up in, there
            for the whole step.
        beside_bytes: what the step has no use for and its loop keeps all the same.
    """

    parameter_bytes: int
    state_bytes: int
    input_bytes: int
    optimizer_bytes: int
    update_workspace_bytes: int
    gradient_bytes: int
    accumulated_bytes: int = 0
    beside_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """What is in memory from the step's start to its end."""
        return (
            self.parameter_bytes + self.state_bytes + self.input_bytes + self.optimizer_bytes
            + self.accumulated_bytes + self.beside_bytes
        )

    def peak_bytes(self, schedule_peak_bytes: int) -> int:
        """The whole step's peak, if its schedule's is known."""
        return self.resident_bytes + max(schedule_peak_bytes, self.update_workspace_bytes)


@dataclass(frozen=True)
class StepProfile:
    """A captured training step with its memory outside of the schedule.

    Attributes:
        graph: forward, backward and updates as data.
        memory: everything else.
        device_name: where times were measured.
        torch_version: with which torch.
        machine: other memories and the lanes that reach them, if there are any.
    """

    graph: StepGraph
    memory: StepMemory
    device_name: str
    torch_version: str
    machine: Machine | None = None
