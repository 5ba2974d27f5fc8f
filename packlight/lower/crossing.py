"""What crosses the cuts of a schedule: which buffers each section takes, leaves and passes on.

A buffer crosses a cut if its value is there before and somebody behind the cut needs it before it
is made again. That follows from the schedule alone, for any number of cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.lower.facts import Facts
from packlight.step import Action, Instruction, Operation, OperationKind


@dataclass(frozen=True)
class Bounds:
    """Where a section begins and ends, and what of the step comes in and goes out there.

    Attributes:
        start, end: its instructions.
        takes_primals: it is the first.
        takes_tangents: the backward starts in it.
        results: what it returns: nodes of the joint graph, None, constants.
    """

    start: int
    end: int
    takes_primals: bool
    takes_tangents: bool
    results: tuple[Any, ...]


@dataclass(frozen=True)
class Crossing:
    """What one section exchanges with the others: see `Section`."""

    takes: tuple[int, ...]
    leaves: tuple[int, ...]
    passes: tuple[int, ...]


def crossings(facts: Facts, sections: Sequence[Bounds]) -> list[Crossing]:
    """Return what each section takes, leaves and passes on, in the order of use."""
    trace = _Trace(facts)
    uses_of: list[dict[int, None]] = []
    makes_of: list[set[int]] = []
    for bounds in sections:
        makes, uses = trace.arguments(bounds), {}
        for instruction in facts.schedule.instructions[bounds.start : bounds.end]:
            used, made = trace.of(instruction)
            uses.update(dict.fromkeys(b for b in used if b not in makes))
            makes.update(made)
        returned = trace.values(b for r in bounds.results if (b := facts.buffer_of(r)) is not None)
        uses.update(dict.fromkeys(b for b in returned if b not in makes))
        uses_of.append(uses)
        makes_of.append(makes)
    found: list[Crossing] = []
    later: list[int] = []  # what the sections behind need
    for uses, makes in zip(reversed(uses_of), reversed(makes_of), strict=True):
        leaves = tuple(b for b in later if b in makes)
        passes = tuple(b for b in uses if b in later and b not in makes)
        found.append(Crossing(tuple(uses), leaves, passes))
        later = [*uses, *(b for b in later if b not in makes and b not in uses)]
    assert not later, f"buffers {later} come from nowhere"
    return found[::-1]


class _Trace:
    """Says of each instruction, in order, which buffers' values its code uses and which it makes.

    Constants of the module cross no cut: each section has those that it needs from there.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.joint = facts, facts.step.joint
        self.ran: set[int] = set()
        self.in_transfer: dict[int, OperationKind] = {}
        self.constants = {
            b for b, root in enumerate(self.joint.root_of_buffer)
            if root is not None and root.op == "get_attr"
        }

    def arguments(self, bounds: Bounds) -> set[int]:
        """Return the buffers of the arguments that come in with a section."""
        roots = self.joint.root_of_buffer
        primals = set(self.joint.primals if bounds.takes_primals else ())
        tangents = set(self.joint.tangents if bounds.takes_tangents else ())
        buffers = self.joint.graph.buffers[: len(roots)]  # those in the device's memory
        return {
            b.id for b in buffers
            if roots[b.id] in tangents or (roots[b.id] in primals and b.kind.is_resident)
        }

    def of(self, instruction: Instruction) -> tuple[list[int], Iterable[int]]:
        """Return what an instruction uses and what it makes."""
        target = instruction.target
        if instruction.action is Action.FREE:  # a value is kept until its transfer is over
            is_moving = self.in_transfer.pop(target, None) is not None
            return self.values([target] if is_moving else []), ()
        operation = self.joint.graph.operations[target]
        return self._transfer(operation) if operation.kind.is_transfer else self._compute(operation)

    def _transfer(self, operation: Operation) -> tuple[list[int], Iterable[int]]:
        buffer, is_read = operation.moved, operation.kind is OperationKind.READ
        if buffer in self.facts.streamed:  # its holder has it
            return [], [buffer] if is_read else ()
        self.in_transfer[buffer] = operation.kind
        return ([], [buffer]) if is_read else (self.values([buffer]), ())

    def _compute(self, operation: Operation) -> tuple[list[int], Iterable[int]]:
        index, reads = operation.id, list(operation.reads)
        for buffer in reads:
            if self.in_transfer.get(buffer) is OperationKind.READ:
                del self.in_transfer[buffer]
        if operation.kind is OperationKind.UPDATE:
            primals = self.facts.step.consumed_by[index]
            gradients = [self.joint.backward_results[primal] for primal in primals]
            reads = list(dict.fromkeys(self.joint.buffer_of_node[node] for node in gradients))
        elif index not in self.ran:  # draws from the generator as it is
            reads = [b for b in reads if b not in self.facts.states]
        self.ran.add(index)
        return self.values(reads), operation.creates

    def values(self, buffers: Iterable[int]) -> list[int]:
        """Return those of some buffers whose values may cross a cut."""
        return [b for b in buffers if b in self.facts.values and b not in self.constants]
