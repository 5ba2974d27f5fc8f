"""A joint graph whose backward reads approximations in place of values of the forward.

Packing and unpacking, or whatever an approximation does, are calls like any other: the planner sees
what they take, keeps the small form and lets go of the large one, or makes either again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.writer import GraphWriter
from packlight.moves.lossy.saved import Read, SavedValue
from packlight.torch_internals.aot import TRACED_IN_BACKWARD
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten


class Kept(Protocol):
    """What is kept of a value, in the graph that is written."""

    def argument(self, read: Read) -> fx.Node:
        """Write what a reader gets in place of the value."""

    def result(self, read: Read, gradient: fx.Node) -> fx.Node | None:
        """Write what stands for a reader as a whole; None where it is called with `argument`.

        Args:
            read: of the reader.
            gradient: its first other argument, in the graph that is written.
        """


class Approximation(Protocol):
    """A way to keep less of a value."""

    def keep(self, value: SavedValue, writers: Writers, seed: int) -> Kept:
        """Write, behind the value, what is kept of it."""


class Writers:
    """Writes into the new graph.

    Attributes:
        early: calls of the forward.
        late: calls of the backward.
        copies: of nodes so far.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        fake_mode = fake_mode_of(module)
        self.early = GraphWriter(self.graph, fake_mode, {})
        self.late = GraphWriter(self.graph, fake_mode, TRACED_IN_BACKWARD)

    def viewed(
        self, read: Read, value: fx.Node, writer: GraphWriter | None = None
    ) -> fx.Node:
        """Return the argument that a reader looks at.

        Args:
            read: of the reader.
            value: the whole, or what is unpacked in its place.
            writer: of the views; `late` if None.
        """
        writer = writer or self.late
        made = {read.views[0].all_input_nodes[0]: value} if read.views else {}
        for view in read.views:
            args, kwargs = fx.map_arg((view.args, view.kwargs), made.__getitem__)
            value = made[view] = writer.call(view, view.target, args, kwargs)
        return value


def approximated(
    module: fx.GraphModule, chosen: Mapping[SavedValue, Approximation], seed: int = 0
) -> fx.GraphModule:
    """Return a joint graph whose backward reads approximations.

    Args:
        module: from AOTAutograd; stays as it is.
        chosen: values of this module, each with what becomes of it.
        seed: random bits depend on it; each value has its own.
    """
    value_of = {value.node: (place, value) for place, value in enumerate(chosen)}
    reads: dict[fx.Node, list[tuple[SavedValue, Read]]] = defaultdict(list)
    for value in chosen:
        for read in value.reads:
            reads[read.reader].append((value, read))
    writers = Writers(module)
    kept: dict[SavedValue, Kept] = {}
    for node in module.graph.nodes:
        copies = writers.copies
        if node in reads:
            copies[node] = _copied_reader(node, reads[node], kept, writers)
        else:
            copies[node] = writers.graph.node_copy(node, copies.__getitem__)
        if node in value_of:
            place, value = value_of[node]
            kept[value] = chosen[value].keep(value, writers, _seed_of(place, seed))
    _erase_unread_views(module, chosen, writers)
    copy_calling_convention(module.graph, writers.graph)
    writers.graph.lint()
    made = GraphData(module, writers.graph)
    made.meta.update(module.meta)
    return made


def _copied_reader(
    reader: fx.Node, reads: list[tuple[SavedValue, Read]], kept: Mapping[SavedValue, Kept],
    writers: Writers,
) -> fx.Node:
    if len(reads) == 1:
        value, read = reads[0]
        others = [
            argument for place, argument in enumerate(reader.args)
            if place != read.place and isinstance(argument, fx.Node)
        ]
        if others:
            made = kept[value].result(read, writers.copies[others[0]])
            if made is not None:
                return made
    copy = writers.graph.node_copy(reader, writers.copies.__getitem__)
    with writers.graph.inserting_before(copy):
        for value, read in reads:
            copy.update_arg(read.place, kept[value].argument(read))
    return copy


def _erase_unread_views(
    module: fx.GraphModule, chosen: Iterable[SavedValue], writers: Writers
) -> None:
    """Take out views that only readers looked at: they would keep the value for the backward."""
    views = {view for value in chosen for read in value.reads for view in read.views}
    for node in reversed(module.graph.nodes):
        if node in views and not writers.copies[node].users:
            writers.graph.erase_node(writers.copies[node])


def _seed_of(place: int, seed: int) -> int:
    return (seed * 0x9E3779B1 + (place + 1) * 0x85EBCA77) & 0xFFFFFFFF
