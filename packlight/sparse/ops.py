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

from packlight.errors import MissingExtraError, SparseTensorError
from packlight.sparse import pattern
from packlight.sparse.geometry import (
    Geometry,
    gather_inputs,
    gather_outputs,
    lay_out_inputs,
    lay_out_outputs,
    places,
)
from packlight.threads import run_in_threads

# Below so many multiplications, waking a thread takes longer than what it would do.
MIN_PRODUCTS_PER_THREAD = 2**18

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SeenGradient:
    """What a backward can say of the gradient of a whole weight, zeros included, part by part.

    Attributes:
        at_pattern: returns the gradient at a pattern: (index, how many) -> float32 vector.
        rows: returns rows of the dense gradient, of one group of channels: (first, last) -> matrix.
        row_sizes, column_sizes: return sums of absolute gradients of outputs, of absolute inputs:
            vectors with an element for each row, for each column.
    """

    at_pattern: Callable[[torch.Tensor, int], torch.Tensor]
    rows: Callable[[int, int], torch.Tensor]
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
        values, index: see `packlight.sparse.pattern`.
        bias: (out,) or None.
        weight_shape: (out, in / groups, *kernel).
        stride, padding, dilation: one number for each of the kernel's dimensions.
        groups: of channels.
    """
    geometry = _checked(x, values, index, weight_shape, stride, padding, dilation, groups)
    images, stored = _as_images(x), values.to(torch.float32)
    out = x.new_empty(_output_shape(x, geometry))
    results = _as_images(out)
    starts = _starts(index, stored, weight_shape)
    for first, last in _tiles(geometry):
        rows = last - first
        laid_x = _scratch(x, geometry.input_shape(rows))
        laid_y = _scratch(x, geometry.output_shape(rows))
        lay_out_inputs(geometry, images[first:last], laid_x)
        laid_y.zero_() if bias is None else laid_y.copy_(bias.view(-1, 1, 1, 1))
        _by_rows(
            "multiply", geometry, rows, index, starts, (stored,), (laid_x.view(-1), laid_y)
        )
        gather_outputs(geometry, laid_y, results[first:last])
    return out


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
    kernels = _kernels(dy)
    images, stored = _as_images(dy), values.to(torch.float32)
    # Elements that no stride reaches have a gradient of zero.
    out = dy.new_zeros(input_shape) if _leaves_out(geometry) else dy.new_empty(input_shape)
    results = _as_images(out)
    starts = _starts(index, stored, weight_shape)
    counts, offsets = pattern.parts(index, weight_shape)
    for first, last in _tiles(geometry):
        rows = last - first
        laid_x = _scratch(dy, geometry.input_shape(rows)).zero_()
        laid_y = _scratch(dy, geometry.output_shape(rows))
        lay_out_outputs(geometry, images[first:last], laid_y)
        shared = _arrays(
            stored, counts, offsets, starts, *_layout(geometry, rows),
            laid_x.view(-1), laid_y.view(len(laid_y), -1),
        )
        length = geometry.vector(rows)
        # By input channels: two threads never add to one element.
        taps = geometry.num_columns // geometry.weight_shape[1]
        bounds = _bounds(geometry.weight_shape[1], len(stored) * length)
        run_in_threads(
            kernels.multiply_transposed,
            [
                (a * taps, b * taps, geometry.chunk(rows), length, *shared)
                for a, b in bounds
            ],
        )
        gather_inputs(geometry, laid_x, results[first:last])
    return out


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
    geometry = _checked(x, values, index, weight_shape, stride, padding, dilation, groups)

    def at_pattern(index: torch.Tensor, room: int) -> torch.Tensor:
        return _values_gradient(geometry, dy, x, index, room)

    observe = OBSERVERS.get(index.data_ptr())
    if observe is not None:
        observe(
            SeenGradient(
                at_pattern,
                lambda first, last: _dense_rows(geometry, dy, x, first, last),
                lambda: _as_images(dy).float().abs().sum((0, 2, 3)),
                lambda: _column_sizes(geometry, x),
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
        values, index, weight_shape: see `packlight.sparse.pattern`.
        padding_row: its values get no gradient; -1 for none.
    """
    kernels = _kernels(values)
    asked = _asked_rows(rows, weight_shape)
    out = values.new_zeros((len(asked), int(weight_shape[1])), dtype=torch.float32)
    stored = values.to(torch.float32)
    counts, offsets = pattern.parts(index, weight_shape)
    shared = _arrays(stored, counts, offsets, _starts(index, stored, weight_shape), asked, out)
    bounds = _bounds(len(asked), len(asked) * int(weight_shape[1]))
    run_in_threads(kernels.look_up, [(a, b, *shared) for a, b in bounds])
    return out.to(values.dtype).view(*rows.shape, int(weight_shape[1]))


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
        gradient = torch.zeros(room, dtype=torch.float32, device=dy.device)
        counts, offsets = pattern.parts(index, weight_shape)
        starts = _starts(index, gradient, weight_shape)
        shared = _arrays(gradient, counts, offsets, starts, asked)
        bounds = _bounds(int(weight_shape[0]), grown.numel())
        run_in_threads(
            _kernels(dy).add_looked_up,
            [(a, b, *shared, padding_row, grown.numpy()) for a, b in bounds],
        )
        return gradient

    def dense_rows(first: int, last: int) -> torch.Tensor:
        block = grown.new_zeros(last - first, grown.shape[1])
        is_there = (asked >= first) & (asked < last) & (asked != padding_row)
        return block.index_add_(0, asked[is_there] - first, grown[is_there])

    observe = OBSERVERS.get(index.data_ptr())
    if observe is not None:

        def row_sizes() -> torch.Tensor:
            sizes = grown.new_zeros(int(weight_shape[0]))
            return sizes.index_add_(0, asked, grown.abs().sum(1))

        observe(SeenGradient(at_pattern, dense_rows, row_sizes, lambda: grown.abs().sum(0)))
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


# -- on the CPU


def _kernels(tensor: torch.Tensor) -> Any:
    if tensor.device.type != "cpu":
        raise SparseTensorError(
            f"a tensor on {tensor.device}; sparse products run on the CPU",
            "keep the model dense there, or train this one on the CPU",
        )
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("numba", "sparse", "packlight.sparse") from error
    from packlight.sparse import cpu_kernel

    return cpu_kernel


def _checked(
    x: torch.Tensor, values: torch.Tensor, index: torch.Tensor, weight_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Geometry:
    """Return a call's geometry; refuse tensors that do not fit together."""
    for tensor in (x, values):
        _kernels(tensor)
        if tensor.dtype not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise SparseTensorError(f"a tensor of {tensor.dtype}; known are {known}")
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


def _as_images(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view with two dimensions of space."""
    if tensor.ndim == 4:
        return tensor
    return tensor.unsqueeze(2) if tensor.ndim == 3 else tensor[:, :, None, None]


def _output_shape(x: torch.Tensor, geometry: Geometry) -> tuple[int, ...]:
    return (geometry.batch, geometry.weight_shape[0], *geometry.output_size[4 - x.ndim :])


def _leaves_out(geometry: Geometry) -> bool:
    """Whether some input elements meet no tap."""
    steps = zip(geometry.stride, geometry.kernel, geometry.dilation, strict=True)
    return any(step > 1 and (taps < step or spread > 1) for step, taps, spread in steps)


def _tiles(geometry: Geometry) -> list[tuple[int, int]]:
    size = geometry.tile_rows()
    return [(at, min(at + size, geometry.batch)) for at in range(0, geometry.batch, size)]


def _scratch(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Allocated by torch so that measured peaks include it."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _starts(
    index: torch.Tensor, values: torch.Tensor, weight_shape: Sequence[int]
) -> torch.Tensor:
    starts = pattern.row_starts(index, weight_shape)
    if int(starts[-1]) > len(values) or len(index) < pattern.num_blocks(weight_shape) + len(values):
        raise SparseTensorError(
            f"an index of {len(index)} bytes, for {int(starts[-1])} nonzeros, does not belong to "
            f"{len(values)} values of a weight of shape {tuple(weight_shape)}"
        )
    return starts


def _arrays(*tensors: Any) -> list[Any]:
    return [t.numpy() if isinstance(t, torch.Tensor) else t for t in tensors]


def _layout(geometry: Geometry, rows: int) -> tuple[Any, ...]:
    group_rows = geometry.weight_shape[0] // geometry.groups
    return places(geometry, rows), group_rows, geometry.group_pitch(rows)


def _num_threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // MIN_PRODUCTS_PER_THREAD))


def _bounds(count: int, products: int) -> list[tuple[int, int]]:
    """Return equal parts of a range, one for each thread."""
    num = max(1, min(_num_threads(products), count))
    ends = [count * i // num for i in range(num + 1)]
    return list(zip(ends, ends[1:], strict=False))


def _by_rows(
    kernel: str, geometry: Geometry, rows: int, index: torch.Tensor, starts: torch.Tensor,
    values: tuple[torch.Tensor], laid_out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Run a kernel on all rows of a weight, which threads share by nonzeros."""
    counts, offsets = pattern.parts(index, geometry.weight_shape)
    x, y = laid_out
    length = geometry.vector(rows)
    shared = _arrays(
        *values, counts, offsets, starts, *_layout(geometry, rows), x, y.view(len(y), -1)
    )
    total = int(starts[-1])
    num = _num_threads(total * length)
    shares = torch.tensor([total * i // num for i in range(1, num)], dtype=torch.int32)
    ends = [0, *torch.searchsorted(starts, shares).tolist(), geometry.weight_shape[0]]
    chunk = geometry.chunk(rows)
    run_in_threads(
        getattr(_kernels(x), kernel),
        [(a, b, chunk, length, *shared) for a, b in zip(ends, ends[1:], strict=False)],
    )


def _values_gradient(
    geometry: Geometry, dy: torch.Tensor, x: torch.Tensor, index: torch.Tensor, room: int
) -> torch.Tensor:
    images, grown = _as_images(x), _as_images(dy)
    gradient = torch.zeros(room, dtype=torch.float32, device=x.device)
    starts = _starts(index, gradient, geometry.weight_shape)
    for first, last in _tiles(geometry):
        rows = last - first
        laid_x = _scratch(x, geometry.input_shape(rows))
        laid_y = _scratch(x, geometry.output_shape(rows))
        lay_out_inputs(geometry, images[first:last], laid_x)
        lay_out_outputs(geometry, grown[first:last], laid_y)
        laid_out = (laid_x.view(-1), laid_y)
        _by_rows("multiply_at_pattern", geometry, rows, index, starts, (gradient,), laid_out)
    return gradient


def _dense_rows(
    geometry: Geometry, dy: torch.Tensor, x: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Return rows of the dense gradient, of one group of channels, as a matrix."""
    out, inner, *kernel = geometry.weight_shape
    group = first // (out // geometry.groups)
    if not kernel:
        return dy[:, first:last].float().T @ x.float()
    channels = slice(group * inner, (group + 1) * inner)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        _as_images(dy)[:, first:last].float().contiguous(),
        _as_images(x)[:, channels].float().contiguous(),
        torch.empty(last - first, inner, *geometry.kernel), None, list(geometry.stride),
        list(geometry.padding), list(geometry.dilation), False, [0, 0], 1, [False, True, False],
    )
    return torch.as_tensor(gradient).reshape(last - first, -1)


def _column_sizes(geometry: Geometry, x: torch.Tensor) -> torch.Tensor:
    """Return sums of absolute inputs; taps of a channel have the same, groups are added up."""
    channels = _as_images(x).float().abs().sum((0, 2, 3)).view(geometry.groups, -1).sum(0)
    return channels.repeat_interleave(geometry.num_columns // len(channels))
