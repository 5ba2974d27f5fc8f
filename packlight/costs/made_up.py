"""Arguments like those of a traced call, made up: a call is observed on tensors of its own.

Of a tensor its shape, strides, dtype, device and the size of its storage count, and that two
arguments are one. What is in it matters to few calls: indices have to be within bounds, lengths of
parts to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.torch_internals.storages import lazily_negated

# Random values are made up in pieces of so many, over and over: a prime, so that rows differ.
RANDOM_ELEMENTS = 65537


# Puts numbers into an integer tensor's storage, given a view of it with the tensor's shape.
Fill = Callable[[torch.Tensor, torch.Tensor], Any]


def tensor_arguments(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors among a call's arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def spanned_bytes(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes from a tensor's first element to its last one."""
    if 0 in shape:
        return 0
    last = sum([(size - 1) * step for size, step in zip(shape, stride, strict=True)])
    return (last + 1) * dtype.itemsize


def constant(value: int) -> Fill:
    """Return how to fill in one number everywhere."""
    return lambda storage, tensor: storage.fill_(value)


def _parts_of(total: int, is_first: bool) -> Fill:
    """Return how to fill in lengths of parts, or their ends, of which one part has it all."""

    def fill(storage: torch.Tensor, tensor: torch.Tensor) -> None:
        storage.fill_(0)
        if tensor.ndim and tensor.numel():
            tensor.select(-1, 0 if is_first else -1).fill_(total)

    return fill


def fillings(args: Any, kwargs: Any) -> Iterator[Fill]:
    """Yield what integer tensors may hold, the most widely accepted first.

    Lengths of parts add up to the size of what they are parts of: a dimension of another argument,
    or a number that is given (how long the result is).
    """
    yield constant(0)
    yield constant(1)
    tensors = tensor_arguments(args, kwargs)
    sizes = [int(size) for tensor in tensors for size in tensor.shape]
    numbers = [n for n in pytree.tree_leaves((args, kwargs)) if type(n) is int and n > 1]
    for total in dict.fromkeys([*numbers, *sizes]):
        yield _parts_of(total, is_first=True)
        yield _parts_of(total, is_first=False)


def made_up(
    args: Any, kwargs: Any, fill: Fill | None, random: bool = False
) -> tuple[Any, Any]:
    """Return arguments like (fake) ones.

    Args:
        args: positional ones.
        kwargs: those with a keyword.
        fill: puts numbers into integer tensors; None for tensors of which nothing is read.
        random: different numbers in float tensors.
    """
    made: dict[int, torch.Tensor] = {}

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in made:
            shape, stride = tuple(map(int, leaf.shape)), tuple(map(int, leaf.stride()))
            # Some calls copy the whole storage that they are given a part of.
            spanned = spanned_bytes(shape, stride, leaf.dtype)
            num_bytes = max(spanned, int(leaf.untyped_storage().nbytes()))
            storage = torch.empty(
                num_bytes // leaf.dtype.itemsize, dtype=leaf.dtype, device=leaf.device
            )
            tensor = storage.as_strided(shape, stride)
            if fill is None:
                pass
            elif leaf.dtype == torch.bool:
                storage.fill_(True)
            elif not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
                fill(storage, tensor)
            elif random and leaf.dtype.itemsize >= 2 and storage.numel():
                _fill_at_random(storage)
            else:
                storage.fill_(0.5)
            # Kernels that do not know lazy conjugation and negation are given copies.
            tensor = tensor.conj() if leaf.is_conj() else tensor
            made[id(leaf)] = lazily_negated(tensor) if leaf.is_neg() else tensor
        return made[id(leaf)]

    return pytree.tree_map(make, args), pytree.tree_map(make, kwargs)


def _fill_at_random(values: torch.Tensor) -> None:
    """Fill a vector with numbers between 0.05 and 1, the same ones again every few thousand."""
    piece = values[:RANDOM_ELEMENTS].uniform_(0.05, 1.0)
    for others in values[RANDOM_ELEMENTS:].split(RANDOM_ELEMENTS):
        others.copy_(piece[: len(others)])
