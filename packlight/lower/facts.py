"""What a step and a schedule say about how buffers are held while the step runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from packlight.capture.whole_step import WholeStep
from packlight.step import Operation, OperationKind, Schedule


@dataclass(frozen=True)
class Facts:
    """About one schedule of one step.

    Attributes:
        step: with updates; without, a step whose results and gradients the last sections return.
        schedule: of its graph.
    """

    step: WholeStep
    schedule: Schedule

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """The operations that run more than once."""
        return frozenset(self.step.joint.graph.reruns(self.schedule))

    @cached_property
    def transfers(self) -> tuple[Operation, ...]:
        """The reads and writes that run, in order."""
        graph = self.step.joint.graph
        runs = (graph.operations[run] for run in self.schedule.runs())
        return tuple(operation for operation in runs if operation.kind.is_transfer)

    @cached_property
    def states(self) -> frozenset[int]:
        """The buffers that stand for generator states."""
        return frozenset(self.step.joint.rng_state_of.values())

    @cached_property
    def unused_states(self) -> frozenset[int]:
        """Those that nobody needs: they are taken for operations that run again."""
        state_of = self.step.joint.rng_state_of
        return self.states - {b for o, b in state_of.items() if o in self.recomputed}

    @cached_property
    def kept_of(self) -> dict[fx.Node, int]:
        """Forward result -> the buffer to which it moves."""
        joint = self.step.joint
        return {
            joint.forward_results[results[0]]: joint.graph.operations[operation].creates[0]
            for operation, results in self.step.kept_by.items()
        }

    @cached_property
    def streamed(self) -> frozenset[int]:
        """Parameters and optimizer state that come and go; a holder outside has them.

        A rehearsal, which reads nothing, leaves the holders in peace.
        """
        read = {o.moved for o in self.transfers if o.kind is OperationKind.READ}
        held = {*self.step.parameter_buffer_of.values(), *self.step.state_buffer_of.values()}
        return frozenset(read & held)

    @cached_property
    def offloaded(self) -> frozenset[int]:
        """The buffers that go to a tier."""
        moved = {operation.moved for operation in self.transfers}
        return frozenset(moved - self.streamed - self.unused_states)

    @cached_property
    def values(self) -> frozenset[int]:
        """The buffers whose values generated code has; optimizer state is its holder's alone."""
        roots = self.step.joint.root_of_buffer
        rooted = {b for b, root in enumerate(roots) if root is not None}
        return frozenset((rooted | {*self.kept_of.values()}) - self.unused_states)

    @cached_property
    def last_reads(self) -> frozenset[tuple[int, int]]:
        """(Update, buffer) where nothing reads, writes away or overwrites a buffer after it."""
        operations = self.step.joint.graph.operations
        is_wanted: set[int] = set()
        found: set[tuple[int, int]] = set()
        for run in reversed([*self.schedule.runs()]):
            operation = operations[run]
            if run in self.step.consumed_by:
                found.update((run, b) for b in operation.reads if b not in is_wanted)
            is_wanted.difference_update(operation.creates)
            is_wanted.update(operation.reads)
        return frozenset(found)

    def buffer_of(self, result: Any) -> int | None:
        """Return the buffer behind a result, if it is a tensor."""
        if not isinstance(result, fx.Node):
            return None
        return self.kept_of.get(result, self.step.joint.buffer_of_node.get(result))
