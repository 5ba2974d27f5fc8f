"""Operators that torch's traces replace by others which compute something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey


@contextmanager
def margin_losses_as_they_are() -> Iterator[None]:
    """Trace margin losses of several classes as the calls that they are in eager PyTorch.

    The decomposition of `multilabel_margin_loss` takes places behind a row's -1, which are to be
    left out, for class 0: other losses and gradients. That of `multi_margin_loss` adds up in
    another order.

    Relied upon: a decomposition that stands in before autograd is found in an operator's
    `py_kernels`, and what was found is kept in `_dispatch_cache`.
    """
    aten = torch.ops.aten
    taken: list[tuple[Any, Any]] = []
    for operator in (aten.multilabel_margin_loss_forward.default, aten.multi_margin_loss.default):
        kernel = operator.py_kernels.pop(DispatchKey.Autograd, None)
        if kernel is not None:
            taken.append((operator, kernel))
            operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, kernel in taken:
            operator.py_kernels[DispatchKey.Autograd] = kernel
            operator._dispatch_cache.clear()
