"""Arguments that kernels ignore."""

from __future__ import annotations

import torch
from torch import fx


def drop_ignored_reads(nodes: list[fx.Node]) -> None:
    """Take out arguments that a kernel does not read, which would keep buffers alive for nothing.

    In training, batch norm's backward uses the batch's statistics and ignores the running ones.
    """
    for node in nodes:
        if (
            node.target is torch.ops.aten.native_batch_norm_backward.default
            and node.args[7] is True
        ):
            node.args = (*node.args[:3], None, None, *node.args[5:])
