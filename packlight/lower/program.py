"""A schedule of a whole step as one generated function: forward, backward, updates, transfers.

Where `fit` owns loss and backward, nothing has to pass through autograd: the schedule's calls stand
one after the other in one function, whose generated code drops each value after its last use.
Beside tensors the function is given objects that decide what becomes of results and gradients
(`StepEvents`), of buffers that leave memory (a `Tier`), and of parameters and optimizer state that
do (`StreamedBuffers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from packlight.capture.whole_step import KEEP, UPDATE, WholeStep
from packlight.lower.emit import Emitter
from packlight.memory.tier import SlotSpec
from packlight.step import Action, Instruction, Schedule
from packlight.torch_internals import box_arguments


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


def still_here(value: torch.Tensor) -> None:
    """Do nothing: generated code keeps a value until here, and drops it in its own thread."""


@dataclass(frozen=True)
class Program:
    """A step as one function.

    Attributes:
        module: its `forward` takes one list, which it empties: the primals, the tangents, events,
            tier, streamed buffers (the last two None where nothing is transferred). It returns the
            forward's results; primals that are results are returned as they are.
        slots: what the tier has to hold.
    """

    module: fx.GraphModule
    slots: tuple[SlotSpec, ...]


def emit_program(step: WholeStep, schedule: Schedule) -> Program:
    """Return a function that runs a schedule of a whole step.

    Args:
        step: the captured step.
        schedule: a schedule of its graph that `simulate` accepts.
    """
    counts = schedule.compute_counts()
    recomputed = frozenset(op for op, count in counts.items() if count > 1)
    return _ProgramEmitter(step.joint, recomputed, is_backward=False).program(step, schedule)


@dataclass
class _ProgramEmitter(Emitter):
    """Writes forward, backward, updates and transfers into one graph."""

    kept: dict[int, fx.Node] = field(default_factory=dict)
    slots: list[SlotSpec] = field(default_factory=list)
    slot_of: dict[int, int] = field(default_factory=dict)
    being_written: set[int] = field(default_factory=set)
    being_fetched: set[int] = field(default_factory=set)
    # Values that nobody must drop before their transfer was waited for.
    in_transfer: dict[tuple[int, str], fx.Node] = field(default_factory=dict)

    def program(self, step: WholeStep, schedule: Schedule) -> Program:
        """Write everything."""
        joint = step.joint
        self.whole = step
        # What has a holder outside, which a rehearsal leaves in peace: it fetches nothing.
        fetched = {i.target for i in schedule.instructions if i.action is Action.FETCH}
        self.parameter_of = {
            b: joint.primals[primal]
            for primal, b in step.parameter_buffer_of.items() if b in fetched
        }
        self.streamed = {*self.parameter_of, *(fetched & {*step.state_buffer_of.values()})}
        operations = joint.graph.operations
        self.results_of = {operations[o].creates[0]: r for o, r in step.kept_by.items()}
        self.generator_states = frozenset(joint.rng_state_of.values())
        # Taken only for operations that run again.
        self.unused_states = self.generator_states - {
            b for o, b in joint.rng_state_of.items() if o in self.recomputed
        }
        for node in joint.module.graph.nodes:
            if node.op == "get_attr":
                self.place(node, self.new.node_copy(node))
        away = set(self.parameter_of.values())
        for placeholder in (*joint.primals, *joint.tangents):
            argument = self.new.node_copy(placeholder)
            if placeholder not in away:
                self.place(placeholder, argument)
        self.events = self.new.placeholder("events")
        self.tier, self.holders = self.new.placeholder("tier"), self.new.placeholder("streamed")
        self.last_read_by = _last_read_by_updates(step, schedule)
        self.run(schedule.instructions)
        results = [
            self.kept[index] if index in self.kept else self.value(node)
            for index, node in enumerate(joint.forward_results)
        ]
        self.new.output(tuple(results))
        box_arguments(self.new)
        module = fx.GraphModule(joint.module, self.new, "PacklightStep")
        return Program(module, tuple(self.slots))

    def compute(self, instruction: Instruction) -> None:
        """Write one call."""
        index = instruction.target
        operation = self.step.graph.operations[index]
        for buffer in (*operation.reads, *operation.mutates):
            if buffer in self.being_fetched:
                self._wait(buffer, "wait_fetched", self.being_fetched)
        if instruction.overwrite is not None and instruction.overwrite[1] in self.being_written:
            self._wait(instruction.overwrite[1], "wait_written", self.being_written)
        if operation.name == KEEP:
            self._keep(instruction)
        elif operation.name == UPDATE:
            for buffer in operation.mutates:
                if buffer in self.streamed:
                    self.new.call_method("updating", self._place(buffer))
            primals = self.whole.consumed_by[index]
            nodes = [self.step.backward_results[primal] for primal in primals]
            buffers = [self.step.buffer_of_node[node] for node in nodes]
            for place, (primal, node) in enumerate(zip(primals, nodes, strict=True)):
                if buffers[place] in self.being_written:
                    self._wait(buffers[place], "wait_written", self.being_written)
                is_last_read = (index, buffers[place]) in self.last_read_by
                is_last_use = is_last_read and buffers[place] not in buffers[place + 1 :]
                arguments = (self.events, primal, self.value(node), is_last_use)
                self.new.call_method("gradient", arguments)
        else:
            super().compute(instruction)

    def _keep(self, instruction: Instruction) -> None:
        results = self.whole.kept_by[instruction.target]
        value = self.value(self.step.forward_results[results[0]])
        if instruction.overwrite is None:  # somebody may overwrite it later
            value = self.new.call_function(torch.ops.aten.clone.default, (value,))
        for result in results:  # which are all the same
            self.kept[result] = value
            self.new.call_method("result", (self.events, result, value))
        if instruction.overwrite is not None:
            self.forget(instruction.overwrite[1])

    # -- transfers

    def free(self, buffer: int) -> None:
        """End a buffer's life when its transfers are over."""
        if buffer in self.being_written:
            self._wait(buffer, "wait_written", self.being_written)
        if buffer in self.being_fetched:
            self._wait(buffer, "wait_fetched", self.being_fetched)
        if buffer in self.streamed:
            self.new.call_method("drop", self._place(buffer))
        super().free(buffer)

    def transfer(self, instruction: Instruction) -> None:
        """Start a transfer."""
        buffer = instruction.target
        if buffer in self.unused_states:
            return
        if instruction.action is Action.OFFLOAD:
            self.being_written.add(buffer)
            arguments: tuple[Any, ...] = self._place(buffer)
            if buffer not in self.streamed:
                value = self.in_transfer[buffer, "wait_written"] = self._whole_value(buffer)
                arguments = (*arguments, value)
            self.new.call_method("offload", arguments)
        else:
            assert instruction.action is Action.FETCH, instruction
            self.being_fetched.add(buffer)
            fetched = self.new.call_method("fetch", self._place(buffer))
            if buffer in self.parameter_of:
                self.place(self.parameter_of[buffer], fetched)
            elif buffer not in self.streamed:
                self.in_transfer[buffer, "wait_fetched"] = fetched
                self._set_whole_value(buffer, fetched)

    def _wait(self, buffer: int, method: str, pending: set[int]) -> None:
        pending.discard(buffer)
        self.new.call_method(method, self._place(buffer))
        moved = self.in_transfer.pop((buffer, method), None)
        if moved is not None:
            self.new.call_function(still_here, (moved,))

    def _place(self, buffer: int) -> tuple[fx.Node, int]:
        """Return the object that transfers a buffer, and what it calls that buffer."""
        if buffer in self.streamed:
            return self.holders, buffer
        if buffer not in self.slot_of:
            self.slot_of[buffer] = len(self.slots)
            self.slots.append(self._slot(buffer))
        return self.tier, self.slot_of[buffer]

    def _slot(self, buffer: int) -> SlotSpec:
        described = self.step.graph.buffers[buffer]
        num_bytes, name = described.bytes, described.name
        if buffer in self.generator_states:
            return SlotSpec(
                (num_bytes,), (1,), torch.uint8, torch.device("cpu"), num_bytes, name=name
            )
        results = self.results_of.get(buffer)
        root = (
            self.step.forward_results[results[0]] if results else self.step.root_of_buffer[buffer]
        )
        assert root is not None, f"nothing stands for buffer {buffer}"
        value: Any = root.meta["val"]
        return SlotSpec(
            tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype,
            value.device, num_bytes, int(value.storage_offset()), name,
        )

    def _whole_value(self, buffer: int) -> fx.Node:
        """Return the value that owns a buffer's storage."""
        if buffer in self.generator_states:
            return self.special[buffer]
        if buffer in self.results_of:
            return self.kept[self.results_of[buffer][0]]
        value: fx.Node = self.value(self.step.root_of_buffer[buffer])
        return value

    def _set_whole_value(self, buffer: int, value: fx.Node) -> None:
        if buffer in self.generator_states:
            self.special[buffer] = value
        elif buffer in self.results_of:
            self.kept.update(dict.fromkeys(self.results_of[buffer], value))
        else:
            root = self.step.root_of_buffer[buffer]
            assert root is not None, f"nothing stands for buffer {buffer}"
            self.place(root, value)


def _last_read_by_updates(step: WholeStep, schedule: Schedule) -> set[tuple[int, int]]:
    """Return (update, buffer) where nothing reads, writes away or overwrites a buffer after it."""
    operations = step.joint.graph.operations
    is_wanted: set[int] = set()
    found: set[tuple[int, int]] = set()
    for instruction in reversed(schedule.instructions):
        target = instruction.target
        if instruction.action is Action.COMPUTE:
            operation = operations[target]
            if target in step.consumed_by:
                found.update((target, b) for b in operation.reads if b not in is_wanted)
            is_wanted.difference_update(operation.creates)
            is_wanted.update(operation.reads)
        elif instruction.action is Action.OFFLOAD:
            is_wanted.add(target)
        elif instruction.action is Action.FETCH:
            is_wanted.discard(target)
    return found
