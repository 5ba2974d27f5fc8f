"""Checks that a traced step makes, which have no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

_CHECK = "aten::_linalg_check_errors"


@contextmanager
def linalg_checks_are_calls() -> Iterator[None]:
    """Trace the check of `torch.linalg.inv`, `cholesky` or `solve` as a call like any other.

    AOTAutograd gives what it takes for a side effect a token, another input and output of the
    graph, to keep it in order with others. A check that raises has to come behind what it reads and
    needs no other order.

    Relied upon: `_register_effectful_op` takes the operator's name and an effect, None for none,
    and `_get_effect` tells it; `fx.node.has_side_effect` keeps a call that nobody reads. Where
    effects are not registered, nothing is changed.
    """
    from torch._higher_order_ops import effects

    register = getattr(effects, "_register_effectful_op", None)
    known = effects._get_effect(_CHECK) if hasattr(effects, "_get_effect") else None
    if register is None or known is None:
        yield
        return
    fx.node.has_side_effect(torch.ops.aten._linalg_check_errors.default)
    register(_CHECK, None)
    try:
        yield
    finally:
        register(_CHECK, known)
