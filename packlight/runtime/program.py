"""A schedule of a whole step as one generated function: forward, backward and updates.

Where `fit` owns loss and backward, nothing has to pass through autograd: the schedule's calls stand
one after the other in one function, whose generated code drops each value after its last use.
What becomes of results and gradients is decided by a `StepEvents` that the function is given.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import fx

from packlight.capture.whole_step import KEEP, UPDATE, WholeStep
from packlight.runtime.emit import Emitter
from packlight.step import Action, Instruction, Schedule


class StepEvents(Protocol):
    """What a running step tells its owner."""

    def result(self, index: int, value: torch.Tensor) -> None:
        """Forward result `index` is known; raising here leaves all parameters as they are."""

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        """The gradient of a primal is complete.

        Its storage is the receiver's to keep if `is_last_use`; else others will still read or
        overwrite it.
        """


class IgnoredEvents:
    """For rehearsals: results and gradients are dropped."""

    def result(self, index: int, value: torch.Tensor) -> None:
        """Do nothing."""

    def gradient(self, primal: int, gradient: torch.Tensor, is_last_use: bool) -> None:
        """Do nothing."""


def tell_result(events: StepEvents, index: int, value: torch.Tensor) -> None:
    """Called by generated code."""
    events.result(index, value)


def tell_gradient(
    events: StepEvents, primal: int, gradient: torch.Tensor, is_last_use: bool
) -> None:
    """Called by generated code."""
    events.gradient(primal, gradient, is_last_use)


def emit_program(step: WholeStep, schedule: Schedule) -> fx.GraphModule:
    """Return a function that runs a schedule of a whole step.

    It takes one list, which it empties: the primals, the tangents, the events. It returns the
    forward's results (primals that are results are returned as they are).

    Args:
        step: the captured step.
        schedule: a schedule of its graph that `simulate` accepts.
    """
    counts = schedule.compute_counts()
    recomputed = frozenset(op for op, count in counts.items() if count > 1)
    emitter = _ProgramEmitter(step.joint, recomputed, is_backward=False)
    return emitter.program(step, schedule)


class _ProgramEmitter(Emitter):
    """Writes forward, backward and updates into one graph."""

    def program(self, step: WholeStep, schedule: Schedule) -> fx.GraphModule:
        joint = step.joint
        self.whole = step
        self.kept: dict[int, fx.Node] = {}
        for node in joint.module.graph.nodes:
            if node.op == "get_attr":
                self.place(node, self.new.node_copy(node))
        for placeholder in (*joint.primals, *joint.tangents):
            self.place(placeholder, self.new.node_copy(placeholder))
        self.events = self.new.placeholder("events")
        self.freed_after = _freed_after_updates(step, schedule)
        self.run(schedule.instructions)
        results = [
            self.kept[index] if index in self.kept else self.value(node)
            for index, node in enumerate(joint.forward_results)
        ]
        self.new.output(tuple(results))
        self.new.set_codegen(torch.fx.graph._BoxedCodeGen())
        return fx.GraphModule(joint.module, self.new, "PacklightStep")

    def compute(self, instruction: Instruction) -> None:
        assert instruction.action is Action.COMPUTE
        index = instruction.target
        operation = self.step.graph.operations[index]
        if operation.name == KEEP:
            for result in self.whole.kept_by[index]:
                value = self.value(self.step.forward_results[result])
                if instruction.overwrite is None:  # somebody may overwrite it later
                    value = self.new.call_function(torch.ops.aten.clone.default, (value,))
                self.kept[result] = value
                self.new.call_function(tell_result, (self.events, result, value))
            if instruction.overwrite is not None:
                self.forget(instruction.overwrite[1])
        elif operation.name == UPDATE:
            primals = self.whole.consumed_by[index]
            nodes = [self.step.backward_results[primal] for primal in primals]
            buffers = [self.step.buffer_of_node[node] for node in nodes]
            for place, (primal, node) in enumerate(zip(primals, nodes, strict=True)):
                is_freed = buffers[place] in self.freed_after[index]
                is_last_use = is_freed and buffers[place] not in buffers[place + 1 :]
                arguments = (self.events, primal, self.value(node), is_last_use)
                self.new.call_function(tell_gradient, arguments)
        else:
            super().compute(instruction)


def _freed_after_updates(step: WholeStep, schedule: Schedule) -> dict[int, set[int]]:
    """Return for each update the buffers that are freed right after it."""
    freed: dict[int, set[int]] = {}
    latest: set[int] = set()
    for instruction in schedule.instructions:
        if instruction.action is Action.FREE:
            latest.add(instruction.target)
        elif instruction.action is Action.COMPUTE:
            latest = set()
            if instruction.target in step.consumed_by:
                freed[instruction.target] = latest
    return freed
