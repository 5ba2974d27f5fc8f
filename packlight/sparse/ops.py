"""Sparse products as PyTorch operators, with shape rules and derivatives.

To a captured step they are calls like any other, on two storages: what is recomputed, in which
order and in how many microbatches is nothing that they know of.

`product` is a linear layer or a convolution; `look_up` an embedding. Their backward is made of
operators, too: the gradient of the input, and the gradient of the values, at the pattern only. What
they allocate beside their results is a tile of laid out inputs and outputs, and a number per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from packlight.errors import SparseTensorError
from packlight.sparse import cpu
from packlight.sparse.geometry import Geometry


@dataclass(frozen=True)
class SeenGradient:
    """What a backward can say of the gradient of a whole weight, zeros included, part by part.

    Attributes:
        at_pattern: returns the gradient at a pattern: (index, how many) -> float32 vector.
        rows: returns rows of the dense gradient, of one group of channels: (first, last) -> matrix.
        group_rows: how many rows a group of channels has.
        row_sizes, column_sizes: return sums of absolute gradients of outputs, of absolute inputs:
            vectors with an element for each row, for each column.
    """

    at_pattern: Callable[[torch.Tensor, int], torch.Tensor]
    rows: Callable[[int, int], torch.Tensor]
    group_rows: int
    row_sizes: Callable[[], torch.Tensor]
    column_sizes: Callable[[], torch.Tensor]


# Who is shown the gradient of the weight whose index has this address, in a backward that computes
# it anyway. Growth asks for it, once in many steps; see `packlight.sparse.growth`.
OBSERVERS: dict[int, Callable[[SeenGradient], None]] = {}


@torch.library.custom_op("packlight_sparse::product", mutates_args=())
def product(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Return a linear layer's or a convolution's output, of x's dtype.

    Args:
        x: (n, in, *size) with as many dimensions as the weight; summed in float32.
        values: at the pattern.
        index: see `packlight.sparse.pattern`.
        bias: (out,) or None.
        weight_shape: (out, in / groups, *kernel).
        stride: one number for each of the kernel's dimensions.
        padding: likewise.
        dilation: likewise.
        groups: of channels.
    """
    geometry = _checked(x, weight_shape, stride, padding, dilation, groups)
    return cpu.product(geometry, x, cpu.StoredWeight(values, index, weight_shape), bias)


@torch.library.custom_op("packlight_sparse::product_input_gradient", mutates_args=())
def product_input_gradient(
    dy: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Return the gradient of `product`'s x, of dy's dtype."""
    geometry = Geometry.of(input_shape, weight_shape, stride, padding, dilation, groups)
    weight = cpu.StoredWeight(values, index, weight_shape)
    return cpu.input_gradient(geometry, dy, weight, input_shape)


@torch.library.custom_op("packlight_sparse::product_values_gradient", mutates_args=())
def product_values_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Return the gradient of `product`'s values, at the pattern only, of their dtype."""
    geometry = Geometry.of(x.shape, weight_shape, stride, padding, dilation, groups)

    def at_pattern(index: torch.Tensor, room: int) -> torch.Tensor:
        return cpu.values_gradient(geometry, dy, x, index, room)

    observe = OBSERVERS.get(index.data_ptr())
    if observe is not None:
        observe(
            SeenGradient(
                at_pattern,
                lambda first, last: cpu.dense_rows(geometry, dy, x, first, last),
                geometry.weight_shape[0] // geometry.groups,
                lambda: cpu.row_sizes(dy),
                lambda: cpu.column_sizes(geometry, x),
            )
        )
    return at_pattern(index, len(values)).to(values.dtype)


@torch.library.custom_op("packlight_sparse::look_up", mutates_args=())
def look_up(
    rows: torch.Tensor, values: torch.Tensor, index: torch.Tensor, weight_shape: Sequence[int],
    padding_row: int,
) -> torch.Tensor:
    """Return rows of a weight (rows, columns), zeros included, of the values' dtype.

    Args:
        rows: numbers of any shape, int64 or int32.
        values: at the pattern.
        index: see `packlight.sparse.pattern`.
        weight_shape: (rows, columns).
        padding_row: its values get no gradient; -1 for none.
    """
    asked, columns = _asked_rows(rows, weight_shape), int(weight_shape[1])
    out = cpu.looked_up(asked, cpu.StoredWeight(values, index, weight_shape), columns)
    return out.to(values.dtype).view(*rows.shape, columns)


@torch.library.custom_op("packlight_sparse::look_up_values_gradient", mutates_args=())
def look_up_values_gradient(
    dy: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    weight_shape: Sequence[int],
    padding_row: int,
) -> torch.Tensor:
    """Return the gradient of `look_up`'s values; the padding row's is zero (-1 for none)."""
    asked = _asked_rows(rows, weight_shape)
    grown = dy.reshape(len(asked), -1).to(torch.float32).contiguous()

    def at_pattern(index: torch.Tensor, room: int) -> torch.Tensor:
        return cpu.looked_up_gradient(asked, grown, index, room, weight_shape, padding_row)

    def dense_rows(first: int, last: int) -> torch.Tensor:
        block = grown.new_zeros(last - first, grown.shape[1])
        is_there = (asked >= first) & (asked < last) & (asked != padding_row)
        return block.index_add_(0, asked[is_there] - first, grown[is_there])

    observe = OBSERVERS.get(index.data_ptr())
    if observe is not None:

        def row_sizes() -> torch.Tensor:
            sizes = grown.new_zeros(int(weight_shape[0]))
            return sizes.index_add_(0, asked, grown.abs().sum(1))

        observe(
            SeenGradient(
                at_pattern, dense_rows, int(weight_shape[0]), row_sizes,
                lambda: grown.abs().sum(0),
            )
        )
    return at_pattern(index, len(values)).to(values.dtype)


# -- shapes


@product.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> torch.Tensor:
    size = [
        (n + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for n, pad, spread, taps, step in zip(
            x.shape[2:], padding, dilation, weight_shape[2:], stride, strict=True
        )
    ]
    return x.new_empty([x.shape[0], weight_shape[0], *size])


@product_input_gradient.register_fake
def _(
    dy: torch.Tensor, values: torch.Tensor, index: torch.Tensor, input_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> torch.Tensor:
    return dy.new_empty(input_shape)


@product_values_gradient.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, values: torch.Tensor, index: torch.Tensor,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> torch.Tensor:
    return torch.empty_like(values)


@look_up.register_fake
def _(
    rows: torch.Tensor, values: torch.Tensor, index: torch.Tensor, weight_shape: Sequence[int],
    padding_row: int,
) -> torch.Tensor:
    return values.new_empty([*rows.shape, weight_shape[1]])


@look_up_values_gradient.register_fake
def _(
    dy: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, index: torch.Tensor,
    weight_shape: Sequence[int], padding_row: int,
) -> torch.Tensor:
    return torch.empty_like(values)


# -- derivatives


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, index, bias, *ctx.settings = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, index)
    ctx.input_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype


def _product_backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, values, index = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = product_input_gradient(dy, values, index, list(ctx.input_shape), *ctx.settings)
    if ctx.needs_input_grad[1]:
        dvalues = product_values_gradient(dy, x, values, index, *ctx.settings)
    if ctx.needs_input_grad[3]:
        dbias = dy.sum([0, *range(2, dy.ndim)]).to(ctx.bias_dtype)
    return dx, dvalues, None, dbias, None, None, None, None, None


def _save_look_up(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, values, index, *ctx.settings = inputs
    ctx.save_for_backward(rows, values, index)


def _look_up_backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    rows, values, index = ctx.saved_tensors
    dvalues = look_up_values_gradient(dy, rows, values, index, *ctx.settings)
    return None, dvalues, None, None, None


torch.library.register_autograd(
    "packlight_sparse::product", _product_backward, setup_context=_save_product
)
torch.library.register_autograd(
    "packlight_sparse::look_up", _look_up_backward, setup_context=_save_look_up
)


# -- what is refused


def _checked(
    x: torch.Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Geometry:
    """Return a call's geometry; refuse an input that does not fit the weight."""
    channels = int(weight_shape[1]) * groups
    if x.ndim != len(weight_shape) or x.shape[1] != channels:
        raise SparseTensorError(
            f"an input of shape {tuple(x.shape)}; a weight of shape {tuple(weight_shape)} takes "
            f"{len(weight_shape)} dimensions, of which the second has {channels} elements"
        )
    geometry = Geometry.of(x.shape, weight_shape, stride, padding, dilation, groups)
    if min(geometry.output_size) < 1:
        raise SparseTensorError(
            f"an input of size {tuple(x.shape[2:])}, smaller than the kernel {geometry.kernel} "
            f"with padding {geometry.padding} and dilation {geometry.dilation}"
        )
    return geometry


def _asked_rows(rows: torch.Tensor, weight_shape: Sequence[int]) -> torch.Tensor:
    asked = rows.reshape(-1).to(torch.int64).contiguous()
    if len(asked) and not 0 <= int(asked.min()) <= int(asked.max()) < int(weight_shape[0]):
        raise SparseTensorError(
            f"rows from {int(asked.min())} to {int(asked.max())} of an embedding with "
            f"{int(weight_shape[0])} rows"
        )
    return asked
