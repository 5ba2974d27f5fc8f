"""Rows of a dimension that lie with several ranks: what one needs of the others is sent to it.

    received = exchange_rows(x)           what others have                          (network)
    needed = join_rows(x, received)       with this rank's own, padding filled in   (local)

and backwards

    returned = return_rows(gradient)      for rows that others had of this rank     (network)
    gradient = fold_rows(gradient, returned)                                        (local)

Each is an operator (`join_rows` has the derivative of both, once), so a plan may keep the few rows
that came over the network and join them again, or ask for them again. All ranks give them the same
arguments but for tensors: which of them one is, they ask when they run. Where ranks have as many
rows their results have one shape, although those at a border get less; so all have one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from packlight.ranks.collectives import COLLECTIVES, is_silent, members
from packlight.ranks.rows import FILL, Piece, RowMap
from packlight.torch_internals.storages import num_storage_references


@torch.library.custom_op("packlight::exchange_rows", mutates_args=())
def exchange_rows(
    x: torch.Tensor, dim: int, table: Sequence[int], group_name: str
) -> torch.Tensor:
    """Return rows that others have: (most rows that come to any rank, *other dimensions)."""
    rows, rank = RowMap.decoded(table), members(group_name).rank
    sent = _stacked(x, dim, [piece for _, piece in rows.sent(rank)])
    result = sent.new_empty((rows.most_received, *sent.shape[1:]))
    gone, come = rows.exchanged(rank)
    _exchange(result, sent, come, gone, group_name)
    return result


@exchange_rows.register_fake
def _(x: torch.Tensor, dim: int, table: Sequence[int], group_name: str) -> torch.Tensor:
    return x.new_empty((RowMap.decoded(table).most_received, *_others(x, dim)))


@torch.library.custom_op("packlight::join_rows", mutates_args=())
def join_rows(
    x: torch.Tensor, received: torch.Tensor, dim: int, table: Sequence[int], fill: float,
    group_name: str,
) -> torch.Tensor:
    """Return the rows that this rank needs, of its own and of those that came from others."""
    rows, rank = RowMap.decoded(table), members(group_name).rank
    result = _sized(x, dim, rows.num_needed(rank))
    offset = {}
    end = 0
    for piece in rows.received(rank):
        offset[piece], end = end, end + piece.num_sent
    for piece in rows.pieces(rank):
        place = result.narrow(dim, piece.place, piece.count)
        if piece.owner == FILL:
            place.fill_(fill)
        elif piece.owner == rank:
            place.copy_(_ordered(x.narrow(dim, piece.first, piece.num_sent), dim, piece))
        else:
            theirs = received.narrow(0, offset[piece], piece.num_sent).movedim(0, dim)
            place.copy_(_ordered(theirs, dim, piece))
    return result


@join_rows.register_fake
def _(
    x: torch.Tensor, received: torch.Tensor, dim: int, table: Sequence[int], fill: float,
    group_name: str,
) -> torch.Tensor:
    return _sized(x, dim, RowMap.decoded(table).num_needed(members(group_name).rank))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, ctx.dim, table, _, ctx.group_name = inputs
    ctx.table = list(table)


def _gradients(ctx: Any, gradient: torch.Tensor) -> Any:
    returned = gradient.new_empty(0)
    if RowMap.decoded(ctx.table).most_received:
        returned = return_rows(gradient, ctx.dim, ctx.table, ctx.group_name)
    mine = fold_rows(gradient, returned, ctx.dim, ctx.table, ctx.group_name)
    return mine, None, None, None, None, None


join_rows.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("packlight::return_rows", mutates_args=())
def return_rows(
    gradient: torch.Tensor, dim: int, table: Sequence[int], group_name: str
) -> torch.Tensor:
    """Return gradients of rows that others had of this rank: (most rows of any, *others)."""
    rows, rank = RowMap.decoded(table), members(group_name).rank
    sent = _folded(gradient, dim, rows.received(rank))
    result = sent.new_empty((rows.most_sent, *sent.shape[1:]))
    come, gone = rows.exchanged(rank)
    _exchange(result, sent, come, gone, group_name)
    return result


@return_rows.register_fake
def _(gradient: torch.Tensor, dim: int, table: Sequence[int], group_name: str) -> torch.Tensor:
    return gradient.new_empty((RowMap.decoded(table).most_sent, *_others(gradient, dim)))


@torch.library.custom_op("packlight::fold_rows", mutates_args=())
def fold_rows(
    gradient: torch.Tensor, returned: torch.Tensor, dim: int, table: Sequence[int],
    group_name: str,
) -> torch.Tensor:
    """Return the gradient of this rank's rows, from that of those it needed and what came back."""
    rows, rank = RowMap.decoded(table), members(group_name).rank
    result = _sized(gradient, dim, rows.num_owned(rank)).zero_()
    for piece in rows.pieces(rank):
        if piece.owner == rank:
            place = result.narrow(dim, piece.first, piece.num_sent)
            part = gradient.narrow(dim, piece.place, piece.count)
            place.add_(_ordered(part, dim, piece) if piece.step else part.sum(dim, keepdim=True))
    end = 0
    for _, piece in rows.sent(rank):
        start, end = end, end + piece.num_sent
        result.narrow(dim, piece.first, piece.num_sent).add_(returned[start:end].movedim(0, dim))
    return result


@fold_rows.register_fake
def _(
    gradient: torch.Tensor, returned: torch.Tensor, dim: int, table: Sequence[int],
    group_name: str,
) -> torch.Tensor:
    return _sized(gradient, dim, RowMap.decoded(table).num_owned(members(group_name).rank))


@torch.library.custom_op("packlight::own_numbers", mutates_args=())
def own_numbers(numbers: torch.Tensor, count: int, group_name: str) -> torch.Tensor:
    """Return this rank's of numbers that all ranks have for all: (ranks, most of any, ...)."""
    rank: int = members(group_name).rank
    return numbers[rank, :count].clone()


@own_numbers.register_fake
def _(numbers: torch.Tensor, count: int, group_name: str) -> torch.Tensor:
    return numbers.new_empty((count, *numbers.shape[2:]))


@torch.library.custom_op("packlight::own_part", mutates_args=())
def own_part(x: torch.Tensor, dim: int, num_ranks: int, group_name: str) -> torch.Tensor:
    """Return this rank's of equal parts along a dimension."""
    rank: int = members(group_name).rank
    return x.chunk(num_ranks, dim)[rank].clone(memory_format=torch.contiguous_format)


@own_part.register_fake
def _(x: torch.Tensor, dim: int, num_ranks: int, group_name: str) -> torch.Tensor:
    return _sized(x, dim, x.shape[dim] // num_ranks)


@torch.library.custom_op("packlight::placed_part", mutates_args=())
def placed_part(part: torch.Tensor, dim: int, num_ranks: int, group_name: str) -> torch.Tensor:
    """Return zeros but for this rank's of equal parts along a dimension."""
    whole = _sized(part, dim, part.shape[dim] * num_ranks).zero_()
    whole.chunk(num_ranks, dim)[members(group_name).rank].copy_(part)
    return whole


@placed_part.register_fake
def _(part: torch.Tensor, dim: int, num_ranks: int, group_name: str) -> torch.Tensor:
    return _sized(part, dim, part.shape[dim] * num_ranks)


def _keep_place(ctx: Any, inputs: Any, output: Any) -> None:
    _, *ctx.place = inputs


def _placed(ctx: Any, gradient: torch.Tensor) -> Any:
    return placed_part(gradient, *ctx.place), None, None, None


own_part.register_autograd(_placed, setup_context=_keep_place)


def _others(x: torch.Tensor, dim: int) -> list[int]:
    return [*x.shape[:dim], *x.shape[dim + 1 :]]


def _sized(x: torch.Tensor, dim: int, num_rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:dim], num_rows, *x.shape[dim + 1 :]))


def _ordered(part: torch.Tensor, dim: int, piece: Piece) -> torch.Tensor:
    """Return an owner's rows as they are needed (one row broadcasts), or the other way round."""
    return part.flip(dim) if piece.step < 0 else part


def _stacked(x: torch.Tensor, dim: int, pieces: Sequence[Piece]) -> torch.Tensor:
    """Return rows of this rank, one piece behind the other: (rows, *others)."""
    result = x.new_empty((sum(piece.num_sent for piece in pieces), *_others(x, dim)))
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_sent
        result[start:end].copy_(x.narrow(dim, piece.first, piece.num_sent).movedim(dim, 0))
    return result


def _folded(gradient: torch.Tensor, dim: int, pieces: Sequence[Piece]) -> torch.Tensor:
    """Return gradients of rows that came from others, one piece behind the other."""
    result = gradient.new_empty((sum(p.num_sent for p in pieces), *_others(gradient, dim)))
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_sent
        part = gradient.narrow(dim, piece.place, piece.count).movedim(dim, 0)
        result[start:end].copy_(_ordered(part, 0, piece) if piece.step else part.sum(0, True))
    return result


def _exchange(
    result: torch.Tensor, sent: torch.Tensor, come: list[int], gone: list[int], group_name: str
) -> None:
    """Fill a result's first rows with what others send; the rest is zero."""
    num_come = 0 if is_silent() else sum(come)
    result[num_come:].zero_()
    if is_silent():
        return
    ranks, tensors = members(group_name), (result, sent)
    references = [num_storage_references(tensor) for tensor in tensors]
    ranks.wait(ranks.start_exchange(result[:num_come], sent, come, gone))
    for tensor, count in zip(tensors, references, strict=True):
        ranks.wait_let_go(tensor, count)


EXCHANGE_ROWS = torch.ops.packlight.exchange_rows.default
RETURN_ROWS = torch.ops.packlight.return_rows.default
ROW_EXCHANGES = frozenset({EXCHANGE_ROWS, RETURN_ROWS})
COLLECTIVES.update(ROW_EXCHANGES)
