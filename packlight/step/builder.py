"""Steps written down by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from packlight.step.types import Buffer, BufferKind, Operation, Phase, StepGraph


@dataclass(frozen=True)
class GraphBuilder:
    """Writes a `StepGraph` down by hand: for tests, documentation and experiments.

    >>> build = GraphBuilder()
    >>> x = build.buffer(8, BufferKind.INPUT, "x")
    >>> y = build.operation("f", [x], [16], seconds=1.0)[0]
    >>> graph = build.finish(num_forward=1, forward_outputs=[y], outputs=[y])
    >>> len(graph.operations), graph.buffers[y].bytes
    (1, 16)
    """

    _buffers: list[Buffer] = field(default_factory=list)
    _operations: list[Operation] = field(default_factory=list)

    def buffer(
        self, num_bytes: int, kind: BufferKind = BufferKind.ACTIVATION, name: str = ""
    ) -> int:
        """Add a buffer and return its id."""
        self._buffers.append(Buffer(len(self._buffers), num_bytes, kind, name))
        return len(self._buffers) - 1

    def operation(
        self,
        name: str,
        reads: Iterable[int],
        creates_bytes: Iterable[int],
        *,
        seconds: float = 0.0,
        workspace_bytes: int = 0,
        phase: Phase = Phase.FORWARD,
        kind: BufferKind | None = None,
        is_random: bool = False,
        can_recompute: bool = True,
        overwrites_read: int | None = None,
        layer: str = "",
        mutates: Iterable[int] = (),
    ) -> list[int]:
        """Add an operation and the buffers that it creates; return those buffers' ids."""
        if kind is None:
            kind = BufferKind.ACTIVATION if phase is Phase.FORWARD else BufferKind.GRADIENT
        created = [self.buffer(size, kind, f"{name}.{i}") for i, size in enumerate(creates_bytes)]
        overwrites = () if overwrites_read is None else ((created[0], overwrites_read),)
        self._operations.append(
            Operation(
                len(self._operations),
                name,
                tuple(reads),
                tuple(created),
                seconds,
                workspace_bytes,
                phase,
                is_random,
                can_recompute,
                overwrites,
                layer,
                tuple(mutates),
            )
        )
        return created

    def finish(
        self,
        num_forward: int,
        forward_outputs: Iterable[int],
        outputs: Iterable[int],
    ) -> StepGraph:
        """Return the graph."""
        return StepGraph(
            tuple(self._operations),
            tuple(self._buffers),
            num_forward,
            tuple(forward_outputs),
            tuple(outputs),
        )
