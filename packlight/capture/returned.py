"""What a loss function returns: a scalar tensor, or a tuple that begins with one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.capture.batch import plain_leaves


def loss_of(returned: Any) -> torch.Tensor:
    """Return the loss."""
    loss: torch.Tensor = returned[0] if isinstance(returned, (tuple, list)) else returned
    return loss


def with_items(returned: Any, items: list[Any]) -> Any:
    """Return a tuple or list of the same type with other items."""
    if hasattr(returned, "_fields"):
        return type(returned)(*items)
    return items if isinstance(returned, list) else tuple(items)


def with_loss(returned: Any, loss: torch.Tensor) -> Any:
    """Return the same with another loss."""
    if not isinstance(returned, (tuple, list)):
        return loss
    return with_items(returned, [loss, *returned[1:]])


def extras_of(returned: Any) -> list[tuple[str, Any]]:
    """Return (path, value) of all that is returned beside the loss."""
    if not isinstance(returned, (tuple, list)):
        return []
    return [
        leaf
        for place, item in enumerate(returned)
        if place > 0
        for leaf in plain_leaves(item, f"[{place}]")
    ]


def detached(returned: Any) -> Any:
    """Return the same with tensors through which no gradient goes back; the loss stays as it is."""
    if not isinstance(returned, (tuple, list)):
        return returned
    return with_items(returned, [returned[0], *map(_without_gradient, returned[1:])])


def _without_gradient(extra: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, extra)
