"""The backward of cross entropy in one pass.

The gradient that a negative log-likelihood gives back has one number in a row, and zeros. The
backward of the log-softmax sums up each row, in a pass of its own: that sum is the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_MEAN = 1


def loss_of(node: fx.Node) -> fx.Node | None:
    """Return the loss's backward that hands a log-softmax's backward its gradient, if it is one."""
    if str(node.target) != "aten._log_softmax_backward_data.default":
        return None
    loss, dim = node.args[0], node.args[2]
    assert isinstance(loss, fx.Node)
    if loss.target is not _aten.nll_loss_backward.default or loss.args[3] is not None:
        return None  # (weights of classes: rows have other numbers)
    return loss if loss.meta["val"].dim() == 2 and dim in (1, -1) else None


def log_softmax_backward(
    graph: fx.Graph, node: fx.Node, loss: fx.Node, value: Callable[[Any], Any]
) -> fx.Node:
    """Write a log-softmax's backward without its sum; the bits are those with it.

    Args:
        graph: written to.
        node: the call.
        loss: `loss_of` it.
        value: what stands in the graph for a node.
    """
    call = graph.call_function
    gradient, _, target, _, reduction, ignored, total = loss.args
    number, rows = value(gradient), value(target)
    if reduction == _MEAN:
        number = call(_aten.div.Tensor, (number, value(total)))
    is_counted = call(_aten.ne.Scalar, (rows, ignored))
    nothing = call(_aten.zeros_like.default, (number,))
    number = call(_aten.neg.default, (call(_aten.where.self, (is_counted, number, nothing)),))
    sums = call(_aten.unsqueeze.default, (number, 1))
    probabilities = call(_aten.exp.default, (value(node.args[1]),))
    product = call(_aten.mul.Tensor, (probabilities, sums))
    made = call(_aten.sub.Tensor, (value(loss), product))
    dtype = node.meta["val"].dtype
    if dtype is loss.meta["val"].dtype:
        return made
    return call(_aten._to_copy.default, (made,), {"dtype": dtype})
