"""The rules that say how rows go through an ATen call, by operator.

Pointwise operators are told by their tag. What has no rule here keeps its rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from packlight.moves.chunk.rows import (
    Call,
    Dims,
    Flow,
    Reduced,
    Rule,
    Shape,
    Share,
    is_divisible,
    shape_of,
    tensor_inputs,
)


def rule_of(node: fx.Node) -> Rule | None:
    """Return the rule for a node's operator, None where there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if torch.Tag.pointwise in target.tags:
        return _pointwise
    return _RULES.get(target._opname) if target.namespace == "aten" else None


def is_label_loss(node: fx.Node) -> bool:
    """Return whether a node is a loss of scores and labels, with (loss, total weight)."""
    return rule_of(node) is _nll_forward


def flow(
    node: fx.Node, known: Sequence[Dims | None], output: Dims | None, units: int
) -> Flow | None:
    """Return how rows go through a call, None if its rows are not independent.

    Args:
        node: the call.
        known: row dims of its tensor arguments as far as they are known.
        output: row dims of its result, if known; one of both must be.
        units: number of units.
    """
    rule = rule_of(node)
    if rule is None:
        return None
    shapes = tuple(map(shape_of, tensor_inputs(node)))
    found = rule(Call(node, shapes, shape_of(node), tuple(known), output, units))
    if found is None or (output is not None and found.output != output):
        return None
    for shape, have, want in zip(shapes, known, found.inputs, strict=True):
        if have is not None and have != want:
            return None
        if want is not None and not is_divisible(shape, want, units):
            return None
    is_single = isinstance(node.meta["val"], torch.Tensor)
    values = (node.meta["val"],) if is_single else node.meta["val"]
    for value, share in zip(values, found.shares(is_single), strict=True):
        if isinstance(share, tuple) and not is_divisible(tuple(value.shape), share, units):
            return None
    return found


# -- rules


def _pointwise(call: Call) -> Flow | None:
    """Element by element, with broadcasting; `expand` as well."""
    rank = len(call.result)
    output = call.output
    if output is None:
        index, dims = call.given
        shift = rank - len(call.shapes[index])
        output = tuple(d + shift for d in dims)
    inputs: list[Dims | None] = []
    for shape in call.shapes:
        shift = rank - len(shape)
        rows = tuple(d - shift for d in output if d >= shift and shape[d - shift] > 1)
        if rows and len(rows) < len(output):
            return None
        inputs.append(rows or None)
    return Flow(tuple(inputs), output)


def _along(position: int) -> Rule:
    """Calls that mix elements along one dim only, which is an argument, and keep all the others."""

    def rule(call: Call) -> Flow | None:
        output = call.output or call.given[1]
        dim = int(call.argument(position, 0)) % len(call.result)
        sizes = {tuple(shape[d] for d in output) for shape in (*call.shapes, call.result)}
        if dim in output or len(sizes) > 1:
            return None
        return Flow((output,) * len(call.shapes), output)

    return rule


def _view(call: Call) -> Flow | None:
    """Another shape of the same elements in the same order."""
    shape = call.shapes[0]
    if call.output is not None:
        dims = _through_view(call.result, shape, call.output, call.units)
        return None if dims is None else Flow((dims,), call.output)
    output = _through_view(shape, call.result, call.given[1], call.units)
    return None if output is None else Flow((call.given[1],), output)


def _through_view(shape: Shape, new_shape: Shape, dims: Dims, units: int) -> Dims | None:
    found: list[int] = []
    position = 0
    for old, new in _view_groups(shape, new_shape):
        rows = [d for d in old if d in dims]
        if not rows:
            continue
        # Rows must lead their group, in order, and nothing may come between them.
        if tuple(rows) != dims[position : position + len(rows)] or rows != old[: len(rows)]:
            return None
        position += len(rows)
        if len(rows) == len(dims) and len(new) > 1:
            size, wanted = 1, 0
            while wanted < len(new) and size % units:
                size *= new_shape[new[wanted]]
                wanted += 1
            if size % units:
                return None
            found += new[:wanted]
        elif rows == old or (len(rows) == len(dims) and len(new) == 1):
            found += new
        else:
            return None
    return tuple(found) if position == len(dims) else None


def _view_groups(shape: Shape, new_shape: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of dims that hold the same elements in both shapes; no ones."""
    old = [d for d, size in enumerate(shape) if size != 1]
    new = [d for d, size in enumerate(new_shape) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while (a := math.prod(shape[d] for d in left)) != (
            b := math.prod(new_shape[d] for d in right)
        ):
            if a < b and old:
                left.append(old.pop(0))
            elif new:
                right.append(new.pop(0))
            else:
                return []
        groups.append((left, right))
    return groups


def _permute(call: Call) -> Flow | None:
    rank = len(call.result)
    order = list(range(rank))
    name = call.node.target._schema.name  # type: ignore[union-attr]
    if name == "aten::permute":
        order = [int(d) % rank for d in call.argument(1)]
    elif name == "aten::transpose":
        a, b = int(call.argument(1)) % rank, int(call.argument(2)) % rank
        order[a], order[b] = b, a
    else:
        order.reverse()
    if call.output is not None:
        return Flow((tuple(order[d] for d in call.output),), call.output)
    dims = call.given[1]
    return Flow((dims,), tuple(order.index(d) for d in dims))


def _reduce(call: Call) -> Flow | None:
    """Reductions over some dims: within rows, or (sum and mean) over all rows at once."""
    if call.output is not None and not call.known[0]:
        kept = _kept(call)
        if len(call.result) == len(call.shapes[0]):
            return Flow((call.output,), call.output)
        return Flow((tuple(kept[d] for d in call.output),), call.output)
    dims = call.given[1]
    kept = _kept(call)
    if all(d in kept for d in dims):
        keeps_rank = len(call.result) == len(call.shapes[0])
        return Flow((dims,), dims if keeps_rank else tuple(kept.index(d) for d in dims))
    can_add = call.node.target in _SUMS and not any(d in kept for d in dims)
    return Flow((dims,), Reduced.SUM) if can_add else None


def _kept(call: Call) -> list[int]:
    rank = len(call.shapes[0])
    reduced = call.argument(1)
    if reduced is None or reduced == []:
        return []
    gone = [int(d) % rank for d in (reduced if isinstance(reduced, Sequence) else [reduced])]
    return [d for d in range(rank) if d not in gone]


def _matmul(call: Call) -> Flow | None:
    """mm, addmm and bmm: rows of the result, or a sum where rows are what is summed over."""
    has_bias = len(call.shapes) == 3
    first = len(call.shapes) - 2
    rank = len(call.result)
    row, column = rank - 2, rank - 1
    known = call.known
    output: Share | None = call.output
    if output is None:
        index, dims = next(
            ((i, k) for i, k in enumerate(known) if k is not None and i >= first), (0, ())
        )
        summed = column if index == first else row
        if not dims:
            return None
        output = Reduced.SUM if dims == (summed,) else dims
    if output is Reduced.SUM:
        return None if has_bias else Flow(((column,), (row,)), output)
    assert isinstance(output, tuple)
    if output == (row,):
        operands: tuple[Dims | None, ...] = (output, None)
    elif output == (column,):
        operands = (None, output)
    elif rank == 3 and output == (0,):
        operands = (output, output)
    else:
        return None
    if has_bias:
        shift = rank - len(call.shapes[0])
        rows = tuple(d - shift for d in output if d >= shift and call.shapes[0][d - shift] > 1)
        operands = (rows or None, *operands)
    return Flow(operands, output)


def _nll_forward(call: Call) -> Flow | None:
    """(loss, total weight); arguments: log-probabilities, target, weight or None, reduction."""
    rows = _rows_of_scores(call, 0, 1)
    if rows is None:
        return None
    loss: Share = _target_dims(rows) if call.argument(3) == 0 else Reduced.SUM
    inputs = (rows, _target_dims(rows), *(None for _ in call.shapes[2:]))
    return Flow(inputs, (loss, Reduced.COUNT))


def _nll_backward(call: Call) -> Flow | None:
    """Arguments: gradient, log-probabilities, target, weight or None, reduction, ..., total."""
    rows = call.output or _rows_of_scores(call, 1, 2)
    has_rows = call.argument(4) == 0  # no reduction: one gradient per label
    if rows is None and has_rows and (dims := call.known[0]) is not None:
        rows = _score_dims(dims)
    if rows is None or 1 in rows:
        return None
    target = _target_dims(rows)
    gradient = target if has_rows else None
    return Flow((gradient, rows, target, *(None for _ in call.shapes[3:])), rows)


def _rows_of_scores(call: Call, scores: int, target: int) -> Dims | None:
    if len(call.shapes[scores]) < 2:
        return None
    rows = call.known[scores]
    if rows is None and (dims := call.known[target]) is not None:
        rows = _score_dims(dims)
    return None if rows is None or 1 in rows else rows


def _score_dims(rows: Dims) -> Dims:
    return tuple(d if d == 0 else d + 1 for d in rows)


def _target_dims(rows: Dims) -> Dims:
    return tuple(d if d == 0 else d - 1 for d in rows)


def _filled(call: Call) -> Flow | None:
    """A tensor made from a size: as many rows as are asked for."""
    if call.output is None or any(k is not None for k in call.known):
        return None
    return Flow((None,) * len(call.shapes), call.output)


_aten = torch.ops.aten

# A mean over rows is run as a sum and divided in the end.
MEANS = {_aten.mean.default: _aten.sum.default, _aten.mean.dim: _aten.sum.dim_IntList}
_SUMS = {*MEANS, *MEANS.values()}

# Where a call's arguments name a size that has to become the chunk's.
SIZE_ARGUMENT = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "expand", "slice_backward"), 1),
    **dict.fromkeys(("new_zeros", "new_full", "new_ones"), 1),
    **dict.fromkeys(("full", "zeros", "ones"), 0),
}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("_to_copy", "detach", "alias", "expand", "masked_fill"), _pointwise),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), _pointwise),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze"), _view),
    **dict.fromkeys(("t", "transpose", "permute"), _permute),
    **dict.fromkeys(("slice", "_softmax", "_log_softmax", "gather", "scatter_add"), _along(1)),
    **dict.fromkeys(("slice_backward", "_softmax_backward_data"), _along(2)),
    **dict.fromkeys(("_log_softmax_backward_data",), _along(2)),
    **dict.fromkeys(("scatter", "cat", "cumsum"), _along(1)),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("mm", "addmm", "bmm"), _matmul),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll_forward),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _nll_backward),
    **dict.fromkeys(("new_zeros", "new_full", "new_ones", "full", "zeros", "ones"), _filled),
}
