"""What a whole training step holds besides what a schedule allocates; where that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from packlight.step.types import StepGraph


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of a training step outside of the schedule.

    Attributes:
        parameter_bytes: the model's parameters.
        state_bytes: the model's buffers (batch-norm statistics and the like).
        input_bytes: the batch.
        optimizer_bytes: optimizer state, counted in full even before the first step creates it.
        update_workspace_bytes: the most that the optimizer's step allocates for a moment.
        gradient_bytes: gradients of the parameters, all of them at the step's end (these are part
            of what a schedule allocates, too).
    """

    parameter_bytes: int
    state_bytes: int
    input_bytes: int
    optimizer_bytes: int
    update_workspace_bytes: int
    gradient_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What is in memory from the step's start to its end."""
        return self.parameter_bytes + self.state_bytes + self.input_bytes + self.optimizer_bytes

    @property
    def update_peak_bytes(self) -> int:
        """The peak of the optimizer's step: everything resident, all gradients, its workspace."""
        return self.resident_bytes + self.gradient_bytes + self.update_workspace_bytes


@dataclass(frozen=True)
class StepProfile:
    """A captured training step with its memory outside of the schedule.

    Attributes:
        graph: forward and backward as data.
        memory: everything else.
        device_name: where times were measured.
        torch_version: with which torch.
    """

    graph: StepGraph
    memory: StepMemory
    device_name: str
    torch_version: str
