"""What all of the planner looks up about a graph; what a segment is and an option."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, eq=False)
class Facts:
    """What everything here looks up about a graph, worked out when first asked for."""

    graph: StepGraph

    @cached_property
    def size(self) -> list[int]:
        """Bytes of each buffer, 0 of resident ones."""
        resident = self.graph.resident
        return [0 if b.id in resident else b.bytes for b in self.graph.buffers]

    @cached_property
    def reads(self) -> list[tuple[int, ...]]:
        """What each operation needs in memory, without what is resident."""
        resident = self.graph.resident
        return [tuple(b for b in o.touches if b not in resident) for o in self.graph.computations]

    @cached_property
    def maker(self) -> list[int]:
        """Which operation makes each buffer, -1 where none does."""
        maker = [-1] * len(self.graph.buffers)
        for operation in self.graph.computations:
            for buffer in operation.creates:
                maker[buffer] = operation.id
        return maker

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """The last operation that reads each buffer."""
        return {buffer: i for i, reads in enumerate(self.reads) for buffer in reads}

    @cached_property
    def pinned(self) -> frozenset[int]:
        """The step's outputs that the forward makes."""
        num_forward = self.graph.num_forward
        return frozenset(b for b in self.graph.outputs if 0 <= self.maker[b] < num_forward)

    @cached_property
    def grows(self) -> list[int]:
        """What each operation makes and its workspace, in bytes."""
        size = self.size
        return [
            sum([size[b] for b in o.creates]) + o.workspace_bytes for o in self.graph.computations
        ]

    @cached_property
    def least_peak_bytes(self) -> int:
        """The most that one operation needs in memory: no schedule's peak is smaller."""
        most = 0
        for operation in self.graph.computations:
            touched = sum(self.size[b] for b in {*operation.touches, *operation.creates})
            in_place = max((self.size[created] for created, _ in operation.overwrites), default=0)
            most = max(most, touched + operation.workspace_bytes - in_place)
        return most

    @cached_property
    def can_recompute(self) -> list[bool]:
        """Which operations may run again: none that makes what the forward hands out for good."""
        handed_out = set(self.graph.outputs) & set(self.graph.forward_outputs)
        return [
            o.can_recompute and handed_out.isdisjoint(o.creates) for o in self.graph.computations
        ]

    @cached_property
    def overwrites(self) -> list[tuple[tuple[int, int], ...]]:
        """How each operation may work in place: (overwritten, created), the largest first."""
        size, resident = self.size, self.graph.resident
        return [
            tuple(
                (read, created)
                for created, read in sorted(o.overwrites, key=lambda pair: -size[pair[0]])
                if read not in resident
            )
            if o.overwrites else ()
            for o in self.graph.computations
        ]

    @cached_property
    def last_chance(self) -> list[int]:
        """See `StepGraph.last_chances`."""
        return self.graph.last_chances()

    @cached_property
    def due(self) -> dict[int, tuple[int, ...]]:
        """Where each output must be in memory: as the forward ends, as the step ends."""
        graph = self.graph
        due: dict[int, tuple[int, ...]] = dict.fromkeys(graph.forward_outputs, (graph.num_forward,))
        for buffer in graph.outputs:
            due[buffer] = (*due.get(buffer, ()), len(graph.computations))
        return due

    @cached_property
    def is_due(self) -> npt.NDArray[np.bool_]:
        """Which buffers are outputs of the forward or the step."""
        is_due = np.zeros(len(self.graph.buffers), dtype=np.bool_)
        is_due[list(self.due)] = True
        return is_due

    # -- sets of buffers as bit masks, the bits in the order in which buffers are first made

    @cached_property
    def by_rank(self) -> list[int]:
        """The buffers in the order in which they are first made."""
        maker = self.maker
        return sorted(range(len(maker)), key=lambda buffer: (maker[buffer], buffer))

    @cached_property
    def bit(self) -> list[int]:
        """Each buffer's bit."""
        bit = [0] * len(self.by_rank)
        for rank, buffer in enumerate(self.by_rank):
            bit[buffer] = 1 << rank
        return bit

    @cached_property
    def bytes_of(self) -> Sizes:
        """The bytes of all buffers of a mask."""
        return Sizes([self.size[buffer] for buffer in self.by_rank])

    @cached_property
    def reads_masks(self) -> list[int]:
        """See `reads`."""
        return [mask_of(reads, self.bit) for reads in self.reads]

    @cached_property
    def creates_masks(self) -> list[int]:
        """What each operation makes."""
        return [mask_of(o.creates, self.bit) for o in self.graph.computations]

    @cached_property
    def _by_rank_array(self) -> npt.NDArray[np.int64]:
        return np.array(self.by_rank, dtype=np.int64)

    def buffers_of(self, mask: int) -> list[int]:
        """Return the buffers of a mask by id."""
        buffers: list[int] = self.buffer_array_of(mask).tolist()
        return buffers

    def buffer_array_of(self, mask: int) -> npt.NDArray[np.int64]:
        """Return the same as an array."""
        packed = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), dtype=np.uint8)
        ranks = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
        return np.sort(self._by_rank_array[ranks])


def mask_of(buffers: Iterable[int], bit: list[int]) -> int:
    """Return the set of some buffers."""
    mask = 0
    for buffer in buffers:
        mask |= bit[buffer]
    return mask


class Sizes(dict[int, int]):
    """Sizes of sets of buffers, by mask; each is added up once.

    For few sets again and again: what an operation reads or makes, and parts of that.

    Args:
        sizes: of the buffers, in the order of their bits.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def __missing__(self, mask: int) -> int:
        total, rest = 0, mask
        while rest:
            rank = rest.bit_length() - 1
            rest ^= 1 << rank
            total += self._sizes[rank]
        self[mask] = total
        return total
