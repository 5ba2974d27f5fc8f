"""Torch's functional collectives, as they stand in traced graphs.

Relied upon: `all_reduce(value, operation, group)`, `all_gather_into_tensor(value, size, group)` and
`reduce_scatter_tensor(value, operation, size, group)`, with the group's name; what they return is
there behind `wait_tensor`.
"""

from __future__ import annotations

from typing import Any

import torch

_functional = torch.ops._c10d_functional
ALL_REDUCE = _functional.all_reduce.default
ALL_GATHER = _functional.all_gather_into_tensor.default
REDUCE_SCATTER = _functional.reduce_scatter_tensor.default
WAIT = _functional.wait_tensor.default
_NAMESPACES = ("_c10d_functional", "_dtensor")


def reduced(value: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
    """Return what all ranks of a group have, reduced; a traced call finds this in its graph."""
    result: torch.Tensor = WAIT(ALL_REDUCE(value, operation, group_name))
    return result


def is_exchange(target: Any) -> bool:
    """Whether a call is one by which ranks tell one another something, or waits for one."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES
