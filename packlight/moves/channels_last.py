"""The move: images lie pixel by pixel (channels last), as convolutions want them.

A convolutional network whose images lie channel by channel has them rearranged at every
convolution. Here they are rearranged once, where they come in; what follows from that, kernels keep
by themselves, and it is observed as the graph is read (`capture/layouts.py`). Parameters stay as
they are.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_mode_of
from packlight.capture.writer import GraphWriter
from packlight.moves.draft import Draft
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.torch_internals.aot import is_tangent
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelsLast(Move):
    """Images are rearranged once, and lie channels last from there on."""

    name: ClassVar[str] = "channels-last"
    effect: ClassVar[Effect] = Effect.REORDERS_SUMS
    is_on_request: ClassVar[bool] = True
    may_save_time: ClassVar[bool] = True

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[ChannelsLast | Refusal]:
        """Yield the one setting where convolutions read images that lie otherwise."""
        if _images(draft.graph_module):
            yield ChannelsLast()
        else:
            yield Refusal("no convolution reads images of the batch that lie channel by channel")

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten."""
        return draft.changed(module=with_images_channels_last(draft.graph_module))

    def describe(self, draft: Draft) -> str:
        """Return what is rearranged."""
        return "images channels last"


def with_images_channels_last(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a joint graph whose convolutions read images channels last.

    Args:
        module: the joint graph; stays as it is.
    """
    images = _images(module)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rearranged: dict[fx.Node, fx.Node] = {}
    writer = GraphWriter(graph, fake_mode_of(module), {})
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr") and not rearranged:
            for image in images:
                options = {"memory_format": torch.channels_last}
                clone = writer.call(image, _aten.clone.default, (copies[image],), options)
                clone.meta.pop("desc", None)
                rearranged[image] = clone
        read = ChainMap(rearranged, copies) if node.op == "call_function" else copies
        copies[node] = graph.node_copy(node, read.__getitem__)
    copy_calling_convention(module.graph, graph)
    graph.lint()
    rewritten = GraphData(module, graph)
    rewritten.meta.update(module.meta)
    return rewritten


def _images(module: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs that convolutions read as images and that lie channel by channel."""
    return [
        node for node in module.graph.find_nodes(op="placeholder")
        if not is_tangent(node) and isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.dim() == 4 and value.is_floating_point()
        and not value.is_contiguous(memory_format=torch.channels_last)
        and any(
            user.target is _aten.convolution.default and user.args[0] is node
            for user in node.users
        )
    ]
