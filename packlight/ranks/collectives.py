"""What a model's own ranks tell one another in its forward and backward, one operator each.

A traced model has a collective and a wait behind it. Here both are one call with a result of its
own, so that a plan may have it run again, or drop what it made, as any other operation. They go
through `Ranks`: who waits for a rank that has left its step ends, too, and memory is let go of
where the schedule frees it.

While a plan is made, calls are timed on one rank alone: `silent` has them say nothing then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from packlight.ranks.group import Ranks
from packlight.torch_internals.storages import num_storage_references

# Of torch's functional collectives.
OPERATIONS = {
    "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT, "avg": dist.ReduceOp.AVG,
}

_members: WeakValueDictionary[str, Ranks] = WeakValueDictionary()
_is_silent = False


def talk_through(group_name: str, ranks: Ranks) -> None:
    """Have what is said in a group of torch's be said through ranks."""
    _members[group_name] = ranks


def is_heard(group_name: str) -> bool:
    """Whether what is said in a group of torch's is said through ranks."""
    return group_name in _members


@contextmanager
def silent() -> Iterator[None]:
    """Have nothing said for a while: results have the right shapes, and no right values."""
    global _is_silent
    before, _is_silent = _is_silent, True
    try:
        yield
    finally:
        _is_silent = before


@torch.library.custom_op("packlight::all_reduce", mutates_args=())
def all_reduce(value: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
    """Return what all ranks have, reduced."""
    result = value.contiguous().clone()
    if not _is_silent:
        ranks = _members[group_name]
        references = num_storage_references(result)
        ranks.wait(ranks.start(result.view(-1), OPERATIONS[operation]))
        ranks.wait_let_go(result, references)
    return result


@all_reduce.register_fake
def _(value: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("packlight::all_gather", mutates_args=())
def all_gather(value: torch.Tensor, num_ranks: int, group_name: str) -> torch.Tensor:
    """Return what all ranks have, one behind the other along the first dimension."""
    result = value.new_empty((num_ranks * value.shape[0], *value.shape[1:]))
    parts = result.chunk(num_ranks)
    if _is_silent:
        result.zero_()
        return result
    ranks = _members[group_name]
    parts[ranks.rank].copy_(value)
    references = num_storage_references(result)
    sent = [ranks.start_sharing(part.view(-1), owner) for owner, part in enumerate(parts)]
    while sent:
        ranks.wait(sent.pop(0))
    ranks.wait_let_go(result, references)
    return result


@all_gather.register_fake
def _(value: torch.Tensor, num_ranks: int, group_name: str) -> torch.Tensor:
    return value.new_empty((num_ranks * value.shape[0], *value.shape[1:]))


@torch.library.custom_op("packlight::reduce_scatter", mutates_args=())
def reduce_scatter(
    value: torch.Tensor, operation: str, num_ranks: int, group_name: str
) -> torch.Tensor:
    """Return this rank's part, along the first dimension, of what all ranks have, reduced."""
    rank = 0 if _is_silent else _members[group_name].rank
    reduced = value if _is_silent else all_reduce(value, operation, group_name)
    return reduced.chunk(num_ranks)[rank].clone(memory_format=torch.contiguous_format)


@reduce_scatter.register_fake
def _(value: torch.Tensor, operation: str, num_ranks: int, group_name: str) -> torch.Tensor:
    return value.new_empty((value.shape[0] // num_ranks, *value.shape[1:]))


ALL_REDUCE = torch.ops.packlight.all_reduce.default
ALL_GATHER = torch.ops.packlight.all_gather.default
REDUCE_SCATTER = torch.ops.packlight.reduce_scatter.default
COLLECTIVES = frozenset({ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER})
