"""The move: the loss head, and wide layers, in so many row chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from packlight.moves.chunk.embedding import with_added_rows
from packlight.moves.chunk.regions import Region, find_heads, find_row_groups
from packlight.moves.chunk.rewrite import chunked
from packlight.moves.draft import Draft
from packlight.moves.move import ROUNDING_MARGIN, Effect, Move, Refusal, Room

# A chunk's largest tensor gets about this share of what a schedule may allocate; layers whose
# largest tensor is no larger anyway run whole.
CHUNK_SHARE = 8
# Fewer chunks leave too much of a layer in memory, and too little to choose what to keep from.
FEWEST_LAYER_CHUNKS = 4
# More chunks save little that is not lost to other buffers, and make each of them slower.
MOST_HEAD_CHUNKS = 64
# Planning 1,000 operations takes a few seconds.
MAX_NODES = 6_000


@dataclass(frozen=True)
class Chunk(Move):
    """Calls of a loss head, of MLPs and of attention with explicit scores, a few rows at a time.

    Attributes:
        head_chunks: of the loss head, 1 where it runs whole.
        layer_chunks: of each layer, 1 where they run whole.
        above_bytes: layers whose largest tensor is no larger run whole.
    """

    name: ClassVar[str] = "chunk"
    effect: ClassVar[Effect] = Effect.REORDERS_SUMS

    head_chunks: int = 1
    layer_chunks: int = 1
    above_bytes: int = 0

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Chunk | Refusal]:
        """Yield the head in chunks; layers as well, where that still takes long."""
        assert room.left_bytes is not None, "without a budget the plain step fits"
        head, num_heads = _head(draft), 1
        if head is not None:
            num_heads = _count(head, room.left_bytes, 2)
            yield Chunk(num_heads)
            if not room.found and num_heads < min(MOST_HEAD_CHUNKS, head.rows):
                num_heads = min(4 * num_heads, MOST_HEAD_CHUNKS, head.rows)
                yield Chunk(num_heads)
        slowdown = room.least_slowdown
        if slowdown is not None and slowdown <= ROUNDING_MARGIN:
            return
        above_bytes = room.left_bytes // CHUNK_SHARE
        groups = Chunk(num_heads, above_bytes=above_bytes)._layers(draft)
        if groups:
            num_layers = _count(groups[0], room.left_bytes, FEWEST_LAYER_CHUNKS)
            most = _most_layer_chunks(groups)
            if most < 2:
                yield Refusal(
                    f"with {len(groups)} layers in chunks the step would have more than "
                    f"{MAX_NODES:,} operations to plan"
                )
            elif min(num_layers, most) > 1:
                yield Chunk(num_heads, min(num_layers, most), above_bytes)
        elif head is None:
            yield Refusal("found neither a loss head nor wide layers that could run in chunks")

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten."""
        module = self._with_head(draft)
        if self.layer_chunks > 1:
            module = chunked(module, self._layers(draft), self.layer_chunks)
        return draft.changed(module=with_added_rows(module))

    def describe(self, draft: Draft) -> str:
        """Return which layers run in how many chunks."""
        words = []
        if self.head_chunks > 1:
            words.append(f"loss head in {self.head_chunks} chunks")
        if self.layer_chunks > 1:
            for kind, count in Counter(str(group.kind) for group in self._layers(draft)).items():
                layers = f"{count} {kind}s" if count > 1 else f"1 {kind}"
                words.append(f"{layers} in {self.layer_chunks} chunks")
        return ", ".join(words)

    def _with_head(self, draft: Draft) -> fx.GraphModule:
        head = _head(draft) if self.head_chunks > 1 else None
        if head is None:
            return draft.graph_module
        return draft.once(
            ("head", self.head_chunks),
            lambda: chunked(draft.graph_module, head, self.head_chunks),
        )

    def _layers(self, draft: Draft) -> list[Region]:
        """Return the layers whose tensors are large beside what there is to plan with."""
        groups = draft.once(
            ("layers", self.head_chunks),
            lambda: find_row_groups(self._with_head(draft), draft.loss.num_forward_outputs),
        )
        return [group for group in groups if group.bytes > self.above_bytes]


def _head(draft: Draft) -> Region | None:
    """Return the loss head with the largest tensors."""
    heads = draft.once(
        "heads", lambda: find_heads(draft.graph_module, draft.loss.num_forward_outputs)
    )
    return heads[0] if heads else None


def _most_layer_chunks(groups: list[Region]) -> int:
    """Return the number of chunks beyond which planning would take too long."""
    module = groups[0].nodes[0].graph
    num_members = sum(len(group.nodes) for group in groups)
    return 1 + (MAX_NODES - len(module.nodes)) // num_members


def _count(region: Region, left_bytes: int, fewest: int) -> int:
    count = fewest
    # Where nothing is left, chunks should still be as small as the smallest budget wants them.
    left_bytes = max(left_bytes, region.bytes * CHUNK_SHARE // MOST_HEAD_CHUNKS)
    while count < region.rows and region.bytes * CHUNK_SHARE > left_bytes * count:
        count *= 2
    return min(count, region.rows)
