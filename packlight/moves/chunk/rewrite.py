"""A joint graph rewritten so that a memory-heavy group of calls runs a few rows at a time.

For a language model's loss head with n chunks, forward and backward of one chunk run before the
next, so no more than 1/n of the logits and of their gradient is ever in memory (the idea of Liger
kernels and of Cut Cross-Entropy, Wijmans et al. 2024, here with ATen calls only):

    for each chunk c of rows:
        logits_c = h_c W^T ... loss += loss_c ... grad_c = d loss / d logits_c
        dW += grad_c^T h_c,   dh_c = grad_c W

MLPs in the midst of the network run their forward in chunks and, later in the step, their backward:
a chunk's hidden layer is kept between the two or made again just before its backward, whichever the
planner finds better for that chunk.

torch's own `F.linear_cross_entropy` with `LinearCrossEntropyOptions` (2.13) is not used: a model
has to call it itself, it knows only a linear layer and a cross entropy right next to each other
(no cast, scale, soft cap, label smoothing or second loss between or beside them), under
`torch.compile` it is one opaque call, and it makes all gradients in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.marks import LATE_KEY
from packlight.capture.order import in_order
from packlight.capture.phases import forward_calls
from packlight.moves.chunk.growth import nodes_below
from packlight.moves.chunk.regions import (
    Kind,
    Region,
    find_heads,
    find_row_groups,
)
from packlight.moves.chunk.run import RegionWriter
from packlight.torch_internals.calling import copy_calling_convention

__all__ = ["Kind", "Region", "chunked", "find_heads", "find_row_groups"]

Run = tuple[fx.Node, ...]


def chunked(
    module: fx.GraphModule, regions: Region | Sequence[Region], num_chunks: int
) -> fx.GraphModule:
    """Return a copy of a joint graph in which some of its regions run in row chunks.

    A loss head's chunks come after the rest of the forward, each with its forward and its backward;
    all their calls, and whatever of the forward needs their results, carry `LATE_KEY` in their
    meta. Other regions run where they were. Results differ from the module's in the order of
    summation only. Sums in 16-bit types are kept in float32 until all chunks are in.

    Args:
        module: the joint graph; stays as it is.
        regions: of the joint graph; none overlap.
        num_chunks: as even as possible; of each region no more than its `rows` are made.
    """
    regions = (regions,) if isinstance(regions, Region) else regions
    nodes = list(module.graph.nodes)
    forward = forward_calls(nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    writers = {r: RegionWriter(graph, copies, r, num_chunks) for r in regions}
    writer_of = {run: writers[region] for region in regions for run in region.runs}
    late: set[fx.Node] = set()
    for region in regions:
        if region.kind is Kind.HEAD:
            late |= forward & nodes_below(nodes, set(region.nodes))
    for item in _in_order(nodes, forward, regions):
        if isinstance(item, tuple):
            writer_of[item].write(item)
            continue
        copies[item] = graph.node_copy(item, copies.__getitem__)
        if item in late:
            copies[item].meta[LATE_KEY] = True
    for writer in writers.values():
        writer.writer.erase_unused()
    copy_calling_convention(module.graph, graph)
    graph.lint()
    rewritten = GraphData(module, graph)
    rewritten.meta.update(module.meta)
    return rewritten


def _in_order(
    nodes: Sequence[fx.Node], forward: set[fx.Node], regions: Sequence[Region]
) -> list[fx.Node | Run]:
    """Return runs and the nodes outside of them: each as near to its old place as it can be.

    A run's place is where the last of what it reads is there; a loss head waits for all of the
    forward that does not need it.
    """
    position = {n: i for i, n in enumerate(nodes)}
    item_of: dict[fx.Node, fx.Node | Run] = {n: n for n in nodes}
    place: dict[fx.Node | Run, tuple[int, int]] = {n: (i, 0) for n, i in position.items()}
    for region in regions:
        below = nodes_below(nodes, set(region.nodes)) if region.kind is Kind.HEAD else set()
        for run in region.runs:
            before = {i for n in run for i in n.all_input_nodes} - set(run)
            if region.kind is Kind.HEAD:
                before |= forward - below - set(run)
            last = max(position[n] for n in (*before, run[0]))
            place[run] = (last, position[run[0]] + 1)
            for node in run:
                item_of[node] = run
    inputs: dict[fx.Node | Run, set[fx.Node | Run]] = {}
    for node in nodes:
        inputs.setdefault(item_of[node], set()).update(item_of[i] for i in node.all_input_nodes)
    for item, sources in inputs.items():
        sources.discard(item)
    return in_order(inputs, place)
