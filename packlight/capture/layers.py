"""Where in the model an operation comes from, for reports."""

from __future__ import annotations

import functools
import re

from torch import fx

from packlight.torch_internals.aot import modules_around, sequence_number


def layers_of_nodes(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """Return the module path of each node; nodes outside of every module take their neighbour's."""
    layers: dict[fx.Node, str] = {}
    by_sequence: dict[int, str] = {}
    for node in nodes:
        modules = modules_around(node)
        path = module_path(modules[-1][0]) if modules else ""
        sequence = sequence_number(node)
        if sequence is not None:
            if path:
                by_sequence.setdefault(sequence, path)
            else:
                path = by_sequence.get(sequence, "")
        if path:
            layers[node] = path
    return layers


@functools.cache
def module_path(qualified: str) -> str:
    """Turn dynamo's "L['self']._modules['h']._modules['3'].attn" into "h.3.attn"."""
    names = re.findall(r"_modules\['([^']+)'\]|\.(\w+)|\[(\d+)\]", qualified)
    parts = [next(x for x in match if x) for match in names]
    return ".".join(p for p in parts if p != "_modules")
