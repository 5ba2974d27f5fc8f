"""Layers that normalise with the statistics of a whole batch, which a microbatch does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packlight.capture.layers import layers_of_nodes
from packlight.torch_internals.aot import modules_around


def batch_statistics(module: fx.GraphModule, num_rows: int) -> list[str]:
    """Return the layers (else the operations) of a joint graph that mix rows by normalising them.

    Instance norm reaches ATen as batch norm of one row with rows times channels, and is left out.

    Args:
        module: joint graph.
        num_rows: of the batch that it was traced with.
    """
    nodes = list(module.graph.nodes)
    layers = layers_of_nodes(nodes)
    found = [
        layers.get(n) or n.name
        for n in nodes
        if _uses_batch_statistics(n) and not _is_instance_norm(n, num_rows)
    ]
    return list(dict.fromkeys(found))


def _uses_batch_statistics(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._opname
    if "batch_norm" not in name or "backward" in name or "elemt" in name:
        return False
    if "with_update" in name or "stats" in name:
        return True
    return _argument(node, "training") is True


def _argument(node: fx.Node, name: str) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[place] if place < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return None


def _is_instance_norm(node: fx.Node, num_rows: int) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta["val"].shape[0] != 1:
        return False
    return num_rows > 1 or any("InstanceNorm" in str(kind) for _, kind in modules_around(node))
