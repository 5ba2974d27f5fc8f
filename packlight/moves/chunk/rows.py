"""How rows go through an ATen call: the rules by which a group of calls can run in row chunks.

The rows of a tensor are told by its row dims: dims whose sizes multiply to the number of units
(what a chunk is made of, such as tokens) or a multiple of it, most significant first. Unit u owns
the u-th block of equal length among the rows. Dims of size one are never row dims. A tensor without
row dims is read whole by every chunk; a call that adds over rows returns a sum over chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

Dims = tuple[int, ...]
Shape = tuple[int, ...]


class Reduced(Enum):
    """A result that has no rows.

    SUM: what the chunks return must be added up.
    COUNT: known before any chunk runs (the total weight of the labels).
    """

    SUM = "sum"
    COUNT = "count"


Share = Dims | Reduced


@dataclass(frozen=True)
class Flow:
    """How rows go through one call.

    Attributes:
        inputs: row dims of each tensor argument, None where it is read whole.
        output: row dims of the result, or that it is a sum; one for each item of a tuple.
    """

    inputs: tuple[Dims | None, ...]
    output: Share | tuple[Share, ...]

    def shares(self, is_single: bool) -> tuple[Share, ...]:
        """Return the outputs as a tuple."""
        return (self.output,) if is_single else self.output  # type: ignore[return-value]


@dataclass(frozen=True)
class Call:
    """What a rule looks at: a node, the shapes of its tensors, and what is known of their rows."""

    node: fx.Node
    shapes: tuple[Shape, ...]
    result: Shape
    known: tuple[Dims | None, ...]
    output: Dims | None
    units: int

    @property
    def given(self) -> tuple[int, Dims]:
        """The first argument whose rows are known."""
        return next((i, dims) for i, dims in enumerate(self.known) if dims is not None)

    def argument(self, index: int, default: Any = None) -> Any:
        """Return a positional argument, or its default."""
        return self.node.args[index] if len(self.node.args) > index else default


Rule = Callable[[Call], Flow | None]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among a call's arguments whose value is a tensor or a tuple, in order."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def shape_of(node: fx.Node) -> Shape:
    """Return a node's shape; empty for what is no tensor."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, torch.Tensor) else ()


def is_divisible(shape: Shape, dims: Dims, units: int) -> bool:
    """Return whether row dims hold a whole number of rows per unit."""
    return bool(dims) and math.prod(int(shape[d]) for d in dims) % units == 0


def merged_order(rank: int, dims: Dims) -> list[int]:
    """Return the order of dims in which row dims stand together where the last of them was."""
    order: list[int] = []
    for d in range(rank):
        if d == dims[-1]:
            order += dims
        elif d not in dims:
            order.append(d)
    return order
