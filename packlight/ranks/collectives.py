"""What a model's own ranks tell one another in its forward and backward, one operator each.

A traced model has a collective and a wait behind it. Here both are one call with a result of its
own, so that a plan may have it run again, or drop what it made, as any other operation. In a step
they go through `Ranks`: who waits for a rank that has left its step ends, too, and memory is let go
of where the schedule frees it. Outside of one they go through the group itself.

While a plan is made, calls are timed on one rank alone: `silent` has them say nothing then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from packlight.ranks.group import Ranks
from packlight.ranks.peers import Peers
from packlight.torch_internals.storages import num_storage_references

# Of torch's functional collectives.
OPERATIONS = {
    "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT, "avg": dist.ReduceOp.AVG,
}

_members: WeakValueDictionary[str, Ranks] = WeakValueDictionary()
_peers: WeakValueDictionary[str, Peers] = WeakValueDictionary()
_is_silent = False


def talk_through(group_name: str, ranks: Ranks) -> None:
    """Have what is said in a group of torch's be said through ranks."""
    _members[group_name] = ranks


def peers_of(group: dist.ProcessGroup) -> Peers:
    """Return the ranks of a group of torch's; as long as they are held, operators reach them."""
    name = str(group.group_name)
    return _peers.get(name) or _peers.setdefault(name, Peers(group))


def members(group_name: str) -> Any:
    """Return the `Ranks` or `Peers` that say what is said in a group of torch's."""
    ranks = _members.get(group_name)
    if ranks is not None and not (ranks.has_failed and group_name in _peers):
        return ranks
    return _peers[group_name]


def is_heard(text: str) -> bool:
    """Whether a text names groups of torch's, in which models' ranks tell one another things."""
    names = text.split()
    return bool(names) and all(name in _members or name in _peers for name in names)


def is_silent() -> bool:
    """Whether nothing is said for a while."""
    return _is_silent


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
        ranks = members(group_name)
        references = num_storage_references(result)
        ranks.wait(ranks.start(result.view(-1), OPERATIONS[operation]))
        ranks.wait_let_go(result, references)
    return result


@all_reduce.register_fake
def _(value: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.operation, ctx.group_name = inputs
    assert ctx.operation == "sum" or not output.requires_grad, "sums alone have a derivative"


def _summed(ctx: Any, gradient: torch.Tensor) -> Any:
    """Each rank's result is of use to its own loss: what all of these losses say, added up."""
    return all_reduce(gradient, ctx.operation, ctx.group_name), None, None


all_reduce.register_autograd(_summed, setup_context=_keep)


@torch.library.custom_op("packlight::all_gather", mutates_args=())
def all_gather(value: torch.Tensor, num_ranks: int, group_name: str) -> torch.Tensor:
    """Return what all ranks have, one behind the other along the first dimension."""
    result = value.new_empty((num_ranks * value.shape[0], *value.shape[1:]))
    parts = result.chunk(num_ranks)
    if _is_silent:
        result.zero_()
        return result
    ranks = members(group_name)
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
    rank = 0 if _is_silent else members(group_name).rank
    reduced = value if _is_silent else all_reduce(value, operation, group_name)
    return reduced.chunk(num_ranks)[rank].clone(memory_format=torch.contiguous_format)


@reduce_scatter.register_fake
def _(value: torch.Tensor, operation: str, num_ranks: int, group_name: str) -> torch.Tensor:
    return value.new_empty((value.shape[0] // num_ranks, *value.shape[1:]))


ALL_REDUCE = torch.ops.packlight.all_reduce.default
ALL_GATHER = torch.ops.packlight.all_gather.default
REDUCE_SCATTER = torch.ops.packlight.reduce_scatter.default
# Operators by which ranks tell one another something; the group's name is their last argument.
COLLECTIVES: set[Any] = {ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER}
