"""Which parts of a step to run in row chunks, and in how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from packlight.capture.chunk import Region, chunked, find_heads, find_row_groups
from packlight.capture.embedding import with_added_rows
from packlight.runtime.step_capture import CapturedLoss
from packlight.runtime.ways import ROUNDING_MARGIN, Way

# A chunk's largest tensor gets about this share of what a schedule may allocate; layers whose
# largest tensor is no larger anyway run whole.
CHUNK_SHARE = 8
# Fewer chunks leave too much of a layer in memory, and too little to choose what to keep from.
FEWEST_LAYER_CHUNKS = 4
# Planning 1,000 operations takes a few seconds.
MAX_NODES = 6_000


@dataclass(frozen=True)
class Chunks:
    """In how many chunks parts of a step run, 1 where they run whole.

    Attributes:
        head: chunks of the loss head.
        layers: chunks of MLPs and other layers with much in memory.
    """

    head: int = 1
    layers: int = 1


@dataclass
class Chunking:
    """The joint graph of one captured loss, and its rewritings.

    Args:
        loss: as captured.
        left_bytes: what a schedule may allocate; None for no limit.

    Attributes:
        why_not: why something could not run in chunks, once that was looked for.
    """

    loss: CapturedLoss
    left_bytes: int | None
    why_not: str = ""
    _modules: dict[Chunks, fx.GraphModule] = field(default_factory=dict)
    _with_heads: dict[int, fx.GraphModule] = field(default_factory=dict)
    _groups: dict[int, list[Region]] = field(default_factory=dict)
    _heads: list[Region] | None = None

    def counts(self, found: Collection[Way]) -> Iterator[Chunks]:
        """Yield what to try, as long as `found` (which grows meanwhile) may be improved by that."""
        yield Chunks()
        if any(way.is_plain for way in found):
            return
        assert self.left_bytes is not None, "without a budget the plain step fits"
        head, num_heads = self._head(), 1
        if head is not None:
            num_heads = _count(head, self.left_bytes, 2)
            yield Chunks(num_heads)
            if not found and num_heads < head.rows:
                num_heads = min(4 * num_heads, head.rows)
                yield Chunks(num_heads)
        if found and min(_slowdown(way) for way in found) <= ROUNDING_MARGIN:
            return
        groups = self._layers(num_heads)
        if groups:
            num_layers = _count(groups[0], self.left_bytes, FEWEST_LAYER_CHUNKS)
            num_layers = min(num_layers, self._most_layer_chunks(num_heads, groups))
            if num_layers > 1:
                yield Chunks(num_heads, num_layers)
        elif head is None:
            self.why_not = "found neither a loss head nor wide layers that could run in chunks"

    def module(self, chunks: Chunks) -> fx.GraphModule:
        """Return the joint graph with its parts in chunks."""
        if chunks not in self._modules:
            module = self._with_head(chunks.head)
            if chunks.layers > 1:
                module = chunked(module, self._layers(chunks.head), chunks.layers)
            if chunks != Chunks():
                module = with_added_rows(module)
            self._modules[chunks] = module
        return self._modules[chunks]

    def layers(self, chunks: Chunks) -> dict[str, int]:
        """Return how many layers of which kind run in chunks."""
        if chunks.layers == 1:
            return {}
        return dict(Counter(str(group.kind) for group in self._layers(chunks.head)))

    def _head(self) -> Region | None:
        if self._heads is None:
            self._heads = find_heads(self.loss.joint, self.loss.num_forward_outputs)
        return self._heads[0] if self._heads else None

    def _with_head(self, num_chunks: int) -> fx.GraphModule:
        if num_chunks not in self._with_heads:
            head = self._head() if num_chunks > 1 else None
            whole = self.loss.joint
            self._with_heads[num_chunks] = chunked(whole, head, num_chunks) if head else whole
        return self._with_heads[num_chunks]

    def _layers(self, num_head_chunks: int) -> list[Region]:
        """Return the layers whose tensors are large beside what there is to plan with."""
        if num_head_chunks not in self._groups:
            module = self._with_head(num_head_chunks)
            groups = find_row_groups(module, self.loss.num_forward_outputs)
            least_bytes = (self.left_bytes or 0) / CHUNK_SHARE
            self._groups[num_head_chunks] = [g for g in groups if g.bytes > least_bytes]
        return self._groups[num_head_chunks]

    def _most_layer_chunks(self, num_head_chunks: int, groups: Sequence[Region]) -> int:
        """Return the number of chunks beyond which planning would take too long."""
        module = groups[0].nodes[0].graph
        num_members = sum(len(group.nodes) for group in groups)
        most = 1 + (MAX_NODES - len(module.nodes)) // num_members
        if most < 2:
            self.why_not = (
                f"with {len(groups)} layers in chunks the step would have more than {MAX_NODES:,} "
                "operations to plan"
            )
        return most


def _count(region: Region, left_bytes: int, fewest: int) -> int:
    count = fewest
    while count < region.rows and region.bytes * CHUNK_SHARE > left_bytes * count > 0:
        count *= 2
    return min(count, region.rows)


def _slowdown(way: Way) -> float:
    return max(part.plan.slowdown for part in way.parts)
