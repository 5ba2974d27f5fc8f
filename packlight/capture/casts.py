"""One cast per weight and dtype, however often a layer is used.

Eager PyTorch's autocast remembers the low-precision copy of a weight until its block ends; while a
graph is traced that memory is switched off, and a shared layer's weight is cast for each use. All
those copies are equal, so one of them does. What becomes of it is the schedule's business: it can
be dropped and made again from the weight, which is in memory anyway.

Gradients stay as traced: those of several uses are added in the weight's own dtype, where eager
PyTorch adds them in the low one. That differs in the last bits of the low dtype, for shared layers
only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def merge_casts(joint: fx.GraphModule, primals: Iterable[fx.Node]) -> int:
    """Change a joint graph so that equal casts of a primal are one; return how many went.

    Args:
        joint: a joint graph without mutation, as AOTAutograd makes it.
        primals: those of its placeholders whose casts are looked at.
    """
    num_merged = 0
    for primal in primals:
        first: dict[Any, fx.Node] = {}
        for node in list(primal.users):  # in the order of the graph
            if node.target is not torch.ops.aten._to_copy.default or node.args != (primal,):
                continue
            kept = first.setdefault(tuple(sorted(node.kwargs.items(), key=str)), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                joint.graph.erase_node(node)
                num_merged += 1
    if num_merged:
        joint.recompile()
    return num_merged
