"""Embedding gradients added row by row to a gradient that is there already.

An embedding that shares its weight with the loss head (or with another embedding) gets two whole
gradients, which autograd adds up: twice the vocabulary in memory. Here the rows of the one are
added to the other where it lies. Sums are the same up to their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.writer import GraphWriter
from packlight.torch_internals.calling import copy_calling_convention

_aten = torch.ops.aten


def with_added_rows(module: fx.GraphModule) -> fx.GraphModule:
    """Return a joint graph in which embedding gradients are added row by row; the module if none.

    Args:
        module: a joint graph from AOTAutograd; stays as it is.
    """
    sums = {n: found for n in module.graph.nodes if (found := _embedding_operand(n)) is not None}
    if not sums:
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        embedding = sums.get(node)
        if embedding is None:
            if node not in sums.values():
                copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        other, gradient, indices = (
            copies[i]
            for i in (*node.all_input_nodes, *embedding.all_input_nodes)
            if i is not embedding
        )
        marks = {k: v for k, v in node.meta.items() if k.startswith("packlight")}
        writer = GraphWriter(graph, node.meta["val"].fake_mode, marks)
        width = node.meta["val"].shape[1]
        rows = writer.view(embedding, gradient, (-1, width))
        places = writer.view(embedding, indices, (-1,))
        padding_index = embedding.args[3]
        if padding_index != -1:  # its row gets no gradient
            counts = writer.call(embedding, _aten.ne.Scalar, (places, padding_index))
            counts = writer.view(embedding, counts, (-1, 1))
            rows = writer.call(embedding, _aten.mul.Tensor, (rows, counts))
        copies[node] = writer.call(
            node, _aten.index_add.default, (other, 0, places, rows)
        )
    copy_calling_convention(module.graph, graph)
    graph.lint()
    rewritten = GraphData(module, graph)
    rewritten.meta.update(module.meta)
    return rewritten


def _embedding_operand(node: fx.Node) -> fx.Node | None:
    """Return the operand of a sum that is an embedding's gradient and nothing else's business."""
    if node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    value: Any = node.meta.get("val")
    for operand, other in (node.args, node.args[::-1]):
        if not isinstance(operand, fx.Node) or not isinstance(other, fx.Node):
            continue
        if operand.target is not _aten.embedding_dense_backward.default or operand is other:
            continue
        scales_by_frequency = operand.args[4]
        same = all(
            n.meta["val"].shape == value.shape and n.meta["val"].dtype == value.dtype
            for n in (operand, other)
        )
        if same and len(operand.users) == 1 and not scales_by_frequency:
            return operand
    return None
