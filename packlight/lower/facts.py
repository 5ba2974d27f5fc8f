"""What a step and a schedule say about how buffers are held while the step runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from packlight.capture.whole_step import WholeStep
from packlight.step import Action, Schedule


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
        counts = self.schedule.compute_counts()
        return frozenset(operation for operation, count in counts.items() if count > 1)

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

        A rehearsal, which fetches nothing, leaves the holders in peace.
        """
        instructions = self.schedule.instructions
        fetched = {i.target for i in instructions if i.action is Action.FETCH}
        held = {*self.step.parameter_buffer_of.values(), *self.step.state_buffer_of.values()}
        return frozenset(fetched & held)

    @cached_property
    def offloaded(self) -> frozenset[int]:
        """The buffers that go to a tier."""
        transfers = (Action.OFFLOAD, Action.FETCH)
        moved = {i.target for i in self.schedule.instructions if i.action in transfers}
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
        for instruction in reversed(self.schedule.instructions):
            target = instruction.target
            if instruction.action is Action.COMPUTE:
                operation = operations[target]
                if target in self.step.consumed_by:
                    found.update((target, b) for b in operation.reads if b not in is_wanted)
                is_wanted.difference_update(operation.creates)
                is_wanted.update(operation.reads)
            elif instruction.action is Action.OFFLOAD:
                is_wanted.add(target)
            elif instruction.action is Action.FETCH:
                is_wanted.discard(target)
        return frozenset(found)

    def buffer_of(self, result: Any) -> int | None:
        """Return the buffer behind a result, if it is a tensor."""
        if not isinstance(result, fx.Node):
            return None
        return self.kept_of.get(result, self.step.joint.buffer_of_node.get(result))
