"""What segmentation and options are about: an option, a segment, and arrays about the graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from packlight.step import StepGraph


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a segment: what it keeps from its forward for its backward.

    Attributes:
        kept: buffers made by the segment that stay in memory; others are recomputed.
        kept_bytes: their size together with the segment's output frontier.
        extra_seconds: recomputation in the segment's backward.
        forward_peak_bytes: most that the forward adds while keeping these.
        backward_peak_bytes: most in memory during the backward: kept, recomputed, gradients.
        backward_order: the backward's operations and the recomputations between them.
    """

    kept: frozenset[int]
    kept_bytes: int
    extra_seconds: float
    forward_peak_bytes: int
    backward_peak_bytes: int
    backward_order: tuple[int, ...]


@dataclass
class Segment:
    """Consecutive forward operations and the backward operations that belong to them.

    Attributes:
        forward, backward: operation ids in order.
        frontier: buffers made before the segment that it or a later one reads.
        frontier_bytes: their size.
        forward_seconds, backward_seconds: without recomputation.
        plain_peak_bytes: most that the forward adds while keeping nothing but its output frontier.
        pile_bytes: gradients that are in memory when the segment's backward starts.
        options: a Pareto front, largest kept_bytes first.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    frontier: frozenset[int]
    frontier_bytes: int
    forward_seconds: float
    backward_seconds: float
    plain_peak_bytes: int = 0
    pile_bytes: int = 0
    options: tuple[Option, ...] = field(default=())


@dataclass(frozen=True)
class Facts:
    """Arrays about a graph that every function here needs."""

    graph: StepGraph
    size: list[int]
    reads: list[tuple[int, ...]]
    maker: list[int]
    pinned: frozenset[int]

    @classmethod
    def of(cls, graph: StepGraph) -> Facts:
        """Return the facts of a graph."""
        resident = [b.id in graph.resident for b in graph.buffers]
        size = [0 if resident[b.id] else b.bytes for b in graph.buffers]
        reads = [tuple(b for b in o.reads if not resident[b]) for o in graph.operations]
        maker = [-1] * len(graph.buffers)
        for o in graph.operations:
            for b in o.creates:
                maker[b] = o.id
        pinned = frozenset(b for b in graph.outputs if 0 <= maker[b] < graph.num_forward)
        return cls(graph, size, reads, maker, pinned)
