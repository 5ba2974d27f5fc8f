"""What tells batches apart that are planned each on their own: where their tensors are, and sizes.

Everything else in a batch counts where the traced code looks at it, which dynamo knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from packlight.capture.batch import batch_leaves
from packlight.capture.step_capture import StepCapture
from packlight.search.reuse import Bucket


class Leaf(NamedTuple):
    """A tensor (or an array, which has no strides here) of a batch."""

    path: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: tuple[Any, ...]


class Signature(NamedTuple):
    """What a plan is for."""

    container: type
    is_training: bool
    leaves: tuple[Leaf, ...]


def signature_of(batch: Any, is_training: bool) -> Signature:
    """Return a batch's signature."""
    leaves = []
    for path, leaf in batch_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            kind = leaf.dtype, leaf.device, leaf.requires_grad
            leaves.append(Leaf(path, tuple(leaf.shape), leaf.stride(), kind))
        elif isinstance(leaf, np.ndarray):
            leaves.append(Leaf(path, leaf.shape, (), (leaf.dtype,)))
    return Signature(type(batch), is_training, tuple(leaves))


def family_of(signature: Signature) -> Any:
    """Return what batches have in common that differ in sizes alone."""
    leaves = [
        (leaf.path, len(leaf.shape), leaf.kind, _order(leaf)) for leaf in signature.leaves
    ]
    return signature.container, signature.is_training, tuple(leaves)


def _order(leaf: Leaf) -> Any:
    """Return whether a tensor's elements lie one after the other, else in which strides."""
    step, steps = 1, []
    for size in reversed(leaf.shape):
        steps.append(step)
        step *= size
    return True if tuple(reversed(steps)) == leaf.strides else leaf.strides


# With so many sizes there will be more.
ENOUGH_SIZES = 3

Dimensions = tuple[tuple[str, frozenset[int]], ...]


@dataclass
class Family:
    """Batches that differ in sizes alone.

    Attributes:
        bucket: the ways that were searched for them.
        is_static: whether no trace can have symbols in the place of sizes.
    """

    bucket: Bucket = field(default_factory=Bucket)
    is_static: bool = False
    _signatures: list[Signature] = field(default_factory=list)

    def changing(self, signature: Signature) -> Dimensions:
        """Return which sizes changed from batch to batch so far, this one included.

        None as long as there are few: a trace with symbols takes longer than one with numbers.
        """
        if signature not in self._signatures:
            self._signatures.append(signature)
        if self.is_static or len(self._signatures) < ENOUGH_SIZES:
            return ()
        first = self._signatures[0]
        found = []
        for place, leaf in enumerate(first.leaves):
            shapes = [s.leaves[place].shape for s in self._signatures]
            dims = frozenset(
                dim for dim in range(len(leaf.shape)) if len({shape[dim] for shape in shapes}) > 1
            )
            if dims and leaf.strides:  # not an array
                found.append((leaf.path, dims))
        return tuple(found)


def num_traced(captures: Mapping[int | None, StepCapture]) -> int:
    """Return how often the losses of some batches were traced."""
    return sum(capture.num_traced for capture in captures.values())
