"""Buffers and operations of a step as they are found in its joint graph, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from packlight.costs.measure import CallFacts
from packlight.step import Buffer, BufferKind, Operation, OperationKind, Phase


class Parts:
    """What a step consists of so far, each part with the node that it was found at.

    Attributes:
        buffers: so far; the kind of those that turn out to be results changes at the end.
        root_of_buffer: the node whose value owns the buffer's whole storage.
        operations: so far.
        node_of_operation: the node that each calls or stands for.
        facts: what was observed of each operation's call, None for pseudo operations.
    """

    def __init__(self, layers: Mapping[fx.Node, str]) -> None:
        """Begin with nothing.

        Args:
            layers: the module that each node was traced in.
        """
        self.buffers: list[Buffer] = []
        self.root_of_buffer: list[fx.Node | None] = []
        self.operations: list[Operation] = []
        self.node_of_operation: list[fx.Node] = []
        self.facts: list[CallFacts | None] = []
        self._layers = layers

    def new_buffer(self, size: int, kind: BufferKind, name: str, root: fx.Node | None) -> int:
        """Add a buffer of so many bytes, return its id."""
        self.buffers.append(Buffer(len(self.buffers), size, kind, name))
        self.root_of_buffer.append(root)
        return len(self.buffers) - 1

    def new_operation(
        self,
        node: fx.Node,
        name: str,
        reads: tuple[int, ...],
        creates: tuple[int, ...],
        phase: Phase,
        *,
        kind: OperationKind = OperationKind.COMPUTE,
        facts: CallFacts | None = None,
        is_random: bool = False,
        can_recompute: bool = True,
        overwrites: tuple[tuple[int, int], ...] = (),
    ) -> int:
        """Add an operation, return its id; a random one reads its generator's state last."""
        # A replay holds the generator's present state while the old one is in place.
        replay_bytes = max((self.buffers[b].bytes for b in reads[-1:] if is_random), default=0)
        operation = Operation(
            id=len(self.operations),
            name=name,
            reads=reads,
            creates=creates,
            phase=phase,
            is_random=is_random,
            seconds=facts.expected_seconds if facts else 0.0,
            workspace_bytes=(facts.workspace_bytes if facts else 0) + replay_bytes,
            can_recompute=can_recompute,
            overwrites=overwrites,
            layer=self._layers.get(node, ""),
            kind=kind,
        )
        self.operations.append(operation)
        self.node_of_operation.append(node)
        self.facts.append(facts)
        return operation.id

    def new_pseudo_operation(
        self, node: fx.Node, kind: OperationKind, reads: tuple[int, ...], creates: int, phase: Phase
    ) -> None:
        """Add an operation that is no call of the graph's and runs once."""
        name = f"packlight.{kind}"
        self.new_operation(node, name, reads, (creates,), phase, kind=kind, can_recompute=False)
