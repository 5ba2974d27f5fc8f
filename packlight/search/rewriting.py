"""How the graph of a captured loss is rewritten before it is planned: packed, in row chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from packlight.capture.step_capture import CapturedLoss
from packlight.moves.chunk.embedding import with_added_rows
from packlight.moves.chunk.rewrite import Region, chunked, find_heads, find_row_groups
from packlight.moves.pack import with_packed_buffers
from packlight.search.ways import ROUNDING_MARGIN, Rewriting, Way

# A chunk's largest tensor gets about this share of what a schedule may allocate; layers whose
# largest tensor is no larger anyway run whole.
CHUNK_SHARE = 8
# Fewer chunks leave too much of a layer in memory, and too little to choose what to keep from.
FEWEST_LAYER_CHUNKS = 4
# More chunks save little that is not lost to other buffers, and make each of them slower.
MOST_HEAD_CHUNKS = 64
# Planning 1,000 operations takes a few seconds.
MAX_NODES = 6_000


@dataclass
class Rewriter:
    """The joint graph of one captured loss, and its rewritings.

    Args:
        loss: as captured.
        left_bytes: what a schedule may allocate; None for no limit.
        moves: what may be done.

    Attributes:
        why_not: move -> why it was not possible, once that was looked at.
    """

    loss: CapturedLoss
    left_bytes: int | None
    moves: frozenset[str]
    why_not: dict[str, str] = field(default_factory=dict)
    _modules: dict[Rewriting, fx.GraphModule] = field(default_factory=dict)
    _with_heads: dict[Rewriting, fx.GraphModule] = field(default_factory=dict)
    _groups: dict[Rewriting, list[Region]] = field(default_factory=dict)
    _bases: dict[bool, fx.GraphModule] = field(default_factory=dict)
    _heads: dict[bool, list[Region]] = field(default_factory=dict)

    def candidates(self, found: Mapping[Rewriting, Way]) -> Iterator[Rewriting]:
        """Yield what to try, as long as `found` (which grows meanwhile) may be improved by that."""
        whole, packed = Rewriting(), Rewriting(packs=True)
        yield whole
        if any(way.is_plain for way in found.values()):
            return
        packs = False
        if self._may_pack():
            yield packed
            packs = whole not in found or (
                packed in found and found[packed].seconds < found[whole].seconds
            )
        if any(way.is_plain for way in found.values()):
            return
        yield from self._in_chunks(packs, found)

    def _may_pack(self) -> bool:
        if "pack" not in self.moves:
            self.why_not["pack"] = "not among the moves"
        elif self._base(True) is self._base(False):
            self.why_not["pack"] = "the backward reads no masks and no pooling indices"
        return "pack" not in self.why_not

    def _in_chunks(self, packs: bool, found: Mapping[Rewriting, Way]) -> Iterator[Rewriting]:
        if "chunk" not in self.moves:
            self.why_not["chunk"] = "not among the moves"
            return
        assert self.left_bytes is not None, "without a budget the plain step fits"
        head, num_heads = self._head(packs), 1
        if head is not None:
            num_heads = _count(head, self.left_bytes, 2)
            yield Rewriting(packs, num_heads)
            if not found and num_heads < min(MOST_HEAD_CHUNKS, head.rows):
                num_heads = min(4 * num_heads, MOST_HEAD_CHUNKS, head.rows)
                yield Rewriting(packs, num_heads)
        if found and min(way.slowdown for way in found.values()) <= ROUNDING_MARGIN:
            return
        groups = self._layers(Rewriting(packs, num_heads))
        if groups:
            num_layers = _count(groups[0], self.left_bytes, FEWEST_LAYER_CHUNKS)
            num_layers = min(num_layers, self._most_layer_chunks(groups))
            if num_layers > 1:
                yield Rewriting(packs, num_heads, num_layers)
        elif head is None:
            self.why_not["chunk"] = (
                "found neither a loss head nor wide layers that could run in chunks"
            )

    def module(self, rewriting: Rewriting) -> fx.GraphModule:
        """Return the joint graph, rewritten."""
        if rewriting not in self._modules:
            module = self._with_head(rewriting)
            if rewriting.layer_chunks > 1:
                module = chunked(module, self._layers(rewriting), rewriting.layer_chunks)
            if not rewriting.keeps_order:
                module = with_added_rows(module)
            self._modules[rewriting] = module
        return self._modules[rewriting]

    def layers(self, rewriting: Rewriting) -> dict[str, int]:
        """Return how many layers of which kind run in chunks."""
        if rewriting.layer_chunks == 1:
            return {}
        return dict(Counter(str(group.kind) for group in self._layers(rewriting)))

    def _base(self, packs: bool) -> fx.GraphModule:
        if packs not in self._bases:
            whole = self.loss.joint
            self._bases[packs] = with_packed_buffers(whole) if packs else whole
        return self._bases[packs]

    def _head(self, packs: bool) -> Region | None:
        if packs not in self._heads:
            self._heads[packs] = find_heads(self._base(packs), self.loss.num_forward_outputs)
        return self._heads[packs][0] if self._heads[packs] else None

    def _with_head(self, rewriting: Rewriting) -> fx.GraphModule:
        key = replace(rewriting, layer_chunks=1)
        if key not in self._with_heads:
            module = self._base(key.packs)
            head = self._head(key.packs) if key.head_chunks > 1 else None
            self._with_heads[key] = chunked(module, head, key.head_chunks) if head else module
        return self._with_heads[key]

    def _layers(self, rewriting: Rewriting) -> list[Region]:
        """Return the layers whose tensors are large beside what there is to plan with."""
        key = replace(rewriting, layer_chunks=1)
        if key not in self._groups:
            groups = find_row_groups(self._with_head(key), self.loss.num_forward_outputs)
            least_bytes = (self.left_bytes or 0) / CHUNK_SHARE
            self._groups[key] = [g for g in groups if g.bytes > least_bytes]
        return self._groups[key]

    def _most_layer_chunks(self, groups: list[Region]) -> int:
        """Return the number of chunks beyond which planning would take too long."""
        module = groups[0].nodes[0].graph
        num_members = sum(len(group.nodes) for group in groups)
        most = 1 + (MAX_NODES - len(module.nodes)) // num_members
        if most < 2:
            self.why_not["chunk"] = (
                f"with {len(groups)} layers in chunks the step would have more than {MAX_NODES:,} "
                "operations to plan"
            )
        return most


def _count(region: Region, left_bytes: int, fewest: int) -> int:
    count = fewest
    # Where nothing is left, chunks should still be as small as the smallest budget wants them.
    left_bytes = max(left_bytes, region.bytes * CHUNK_SHARE // MOST_HEAD_CHUNKS)
    while count < region.rows and region.bytes * CHUNK_SHARE > left_bytes * count:
        count *= 2
    return min(count, region.rows)

