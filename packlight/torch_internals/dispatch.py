"""Tensors without memory, and the modes that calls go through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _python_dispatch

__all__ = ["FakeTensorMode"]  # from here, too


def is_fake(value: Any) -> bool:
    """Whether a tensor is one of a trace's, without memory."""
    return isinstance(value, FakeTensor)


def fake_of(mode: FakeTensorMode, meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the meta device as a trace's tensor that says it is on another one."""
    return FakeTensor(mode, meta, device)


@contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Leave every tracing mode: inside a compile call, tensors made here are real ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with ExitStack() as stack:
        stack.enter_context(_python_dispatch._disable_current_modes())
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch._C._DisableTorchDispatch())
        yield


def without_autocast() -> AbstractContextManager[None]:
    """Leave autocast, whichever devices it is on for."""
    manager: AbstractContextManager[None] = torch._C._DisableAutocast()
    return manager


@contextmanager
def undecomposed(overloads: Sequence[Any]) -> Iterator[None]:
    """Trace operators as they are where torch registers decompositions of them for tracing.

    Relied upon: such a decomposition is among the overload's `py_kernels`, under one of two keys;
    which kernel a call takes is remembered in `_dispatch_cache`.
    """
    keys = torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd
    hidden: list[tuple[Any, Any, Any]] = []
    for overload in overloads:
        for key in keys:
            if key in overload.py_kernels:
                hidden.append((overload, key, overload.py_kernels.pop(key)))
        overload._dispatch_cache.clear()
    try:
        yield
    finally:
        for overload, key, kernel in hidden:
            overload.py_kernels[key] = kernel
            overload._dispatch_cache.clear()
