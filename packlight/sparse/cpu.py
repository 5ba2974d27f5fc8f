"""From tensors to compiled kernels of the CPU: tiles, threads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from packlight.errors import SparseTensorError
from packlight.extras import require_numba
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


class StoredWeight:
    """A sparse weight as kernels get it.

    Attributes:
        counts, offsets, starts: see `packlight.sparse.pattern`.
        values: float32; what is computed where these are a gradient.

    Args:
        values: of any dtype of `FLOATS`.
        index: of the values.
        shape: of the weight.
    """

    def __init__(self, values: torch.Tensor, index: torch.Tensor, shape: Sequence[int]) -> None:
        self.starts = pattern.row_starts(index, shape)
        self.num_nonzeros = int(self.starts[-1])
        room = len(index) - pattern.num_blocks(shape)
        if self.num_nonzeros > len(values) or room < len(values):
            raise SparseTensorError(
                f"an index of {len(index)} bytes, for {self.num_nonzeros} nonzeros, does not "
                f"belong to {len(values)} values of a weight of shape {tuple(shape)}"
            )
        self.counts, self.offsets = pattern.parts(index, shape)
        self.values = values.to(torch.float32)

    def arrays(self) -> tuple[Any, ...]:
        """Return (values, counts, offsets, starts)."""
        tensors = (self.values, self.counts, self.offsets, self.starts)
        return tuple(tensor.numpy() for tensor in tensors)


def compiled(*tensors: torch.Tensor) -> Any:
    """Return the module of kernels; refuse tensors that they do not take."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise SparseTensorError(
                f"a tensor on {tensor.device}; sparse products run on the CPU",
                "keep the model dense there, or train this one on the CPU",
            )
        if tensor.dtype not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise SparseTensorError(f"a tensor of {tensor.dtype}; known are {known}")
    require_numba("sparse", "packlight.sparse")
    from packlight.sparse import cpu_kernel

    return cpu_kernel


def product(
    geometry: Geometry, x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the output, of x's dtype."""
    kernels, images = compiled(x), _as_images(x)
    size = geometry.output_size[4 - x.ndim :]
    out = x.new_empty((geometry.batch, geometry.weight_shape[0], *size))
    results = _as_images(out)
    for rows, laid_x, laid_y in _tiles(geometry, x):
        lay_out_inputs(geometry, images[rows], laid_x)
        laid_y.zero_() if bias is None else laid_y.copy_(bias.view(-1, 1, 1, 1))
        _by_rows(kernels.multiply, geometry, weight, laid_x, laid_y)
        gather_outputs(geometry, laid_y, results[rows])
    return out


def input_gradient(
    geometry: Geometry, dy: torch.Tensor, weight: StoredWeight, shape: Sequence[int]
) -> torch.Tensor:
    """Return the gradient of an input of some shape, of dy's dtype."""
    kernels, grown = compiled(dy), _as_images(dy)
    # Elements that no stride reaches have a gradient of zero.
    out = dy.new_zeros(shape) if geometry.leaves_out else dy.new_empty(shape)
    images = _as_images(out)
    inner = geometry.weight_shape[1]
    taps = geometry.num_columns // inner
    for rows, laid_x, laid_y in _tiles(geometry, dy):
        laid_x.zero_()
        lay_out_outputs(geometry, grown[rows], laid_y)
        shared = _shared(geometry, weight, laid_x, laid_y)
        # By input channels: no two threads add to one element.
        num_threads = _num_threads(weight.num_nonzeros * geometry.vector(laid_x.shape[-1]))
        pieces = [(a * taps, b * taps, *shared) for a, b in _equal_parts(inner, num_threads)]
        run_in_threads(kernels.multiply_transposed, pieces)
        gather_inputs(geometry, laid_x, images[rows])
    return out


def values_gradient(
    geometry: Geometry, dy: torch.Tensor, x: torch.Tensor, index: torch.Tensor, room: int
) -> torch.Tensor:
    """Return the gradient of `room` values at a pattern, in float32."""
    kernels, images, grown = compiled(x, dy), _as_images(x), _as_images(dy)
    gradient = torch.zeros(room, dtype=torch.float32, device=x.device)
    weight = StoredWeight(gradient, index, geometry.weight_shape)
    for rows, laid_x, laid_y in _tiles(geometry, x):
        lay_out_inputs(geometry, images[rows], laid_x)
        lay_out_outputs(geometry, grown[rows], laid_y)
        _by_rows(kernels.multiply_at_pattern, geometry, weight, laid_x, laid_y)
    return gradient


def dense_rows(
    geometry: Geometry, dy: torch.Tensor, x: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Return rows of the dense gradient, of one group of channels, as a float32 matrix."""
    out, inner, *kernel = geometry.weight_shape
    if not kernel:
        return dy[:, first:last].float().T @ x.float()
    group = first // (out // geometry.groups)
    channels = slice(group * inner, (group + 1) * inner)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        _as_images(dy)[:, first:last].float().contiguous(),
        _as_images(x)[:, channels].float().contiguous(),
        torch.empty(last - first, inner, *geometry.kernel), None, list(geometry.stride),
        list(geometry.padding), list(geometry.dilation), False, [0, 0], 1, [False, True, False],
    )
    return gradient.reshape(last - first, -1)  # type: ignore[no-any-return]


def row_sizes(dy: torch.Tensor) -> torch.Tensor:
    """Return sums of absolute gradients of outputs."""
    return _as_images(dy).float().abs().sum((0, 2, 3))


def column_sizes(geometry: Geometry, x: torch.Tensor) -> torch.Tensor:
    """Return sums of absolute inputs; taps of a channel have the same, groups are added up."""
    channels = _as_images(x).float().abs().sum((0, 2, 3)).view(geometry.groups, -1).sum(0)
    return channels.repeat_interleave(geometry.num_columns // len(channels))


def looked_up(asked: torch.Tensor, weight: StoredWeight, columns: int) -> torch.Tensor:
    """Return rows of a weight, in float32."""
    kernels = compiled(weight.values)
    out = weight.values.new_zeros((len(asked), columns))
    shared = (*weight.arrays(), asked.numpy(), out.numpy())
    parts = _equal_parts(len(asked), _num_threads(len(asked) * columns))
    run_in_threads(kernels.look_up, [(a, b, *shared) for a, b in parts])
    return out


def looked_up_gradient(
    asked: torch.Tensor, dy: torch.Tensor, index: torch.Tensor, room: int, shape: Sequence[int],
    padding_row: int,
) -> torch.Tensor:
    """Return the gradient of `room` values at a pattern, of a weight whose rows were asked for."""
    kernels = compiled(dy)
    gradient = torch.zeros(room, dtype=torch.float32, device=dy.device)
    weight = StoredWeight(gradient, index, shape)
    shared = (*weight.arrays(), asked.numpy(), padding_row, dy.numpy())
    # Each thread has rows of its own: no two add to one value.
    parts = _equal_parts(int(shape[0]), _num_threads(dy.numel()))
    run_in_threads(kernels.add_looked_up, [(a, b, *shared) for a, b in parts])
    return gradient


def _as_images(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view with two dimensions of space."""
    if tensor.ndim == 4:
        return tensor
    return tensor.unsqueeze(2) if tensor.ndim == 3 else tensor[:, :, None, None]


def _tiles(
    geometry: Geometry, like: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (rows of the batch, room for their inputs laid out, room for their outputs)."""
    size = geometry.tile_rows()
    for first in range(0, geometry.batch, size):
        last = min(first + size, geometry.batch)
        # Allocated by torch so that measured peaks include it.
        shapes = geometry.input_shape(last - first), geometry.output_shape(last - first)
        laid_x, laid_y = (
            torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes
        )
        yield slice(first, last), laid_x, laid_y


def _shared(
    geometry: Geometry, weight: StoredWeight, laid_x: torch.Tensor, laid_y: torch.Tensor
) -> tuple[Any, ...]:
    rows = laid_x.shape[-1]
    return (
        geometry.group(rows), geometry.chunk(rows), geometry.vector(rows), *weight.arrays(),
        places(geometry, rows),
        geometry.weight_shape[0] // geometry.groups, geometry.group_pitch(rows),
        laid_x.view(-1).numpy(), laid_y.view(len(laid_y), -1).numpy(),
    )


def _by_rows(
    kernel: Callable[..., None], geometry: Geometry, weight: StoredWeight, laid_x: torch.Tensor,
    laid_y: torch.Tensor,
) -> None:
    """Run a kernel on all rows of a weight, which threads share by nonzeros."""
    shared = _shared(geometry, weight, laid_x, laid_y)
    num = _num_threads(weight.num_nonzeros * geometry.vector(laid_x.shape[-1]))
    ends = [weight.num_nonzeros * i // num for i in range(1, num)]
    inner = torch.searchsorted(weight.starts, torch.tensor(ends, dtype=torch.int32)).tolist()
    bounds = [0, *inner, geometry.weight_shape[0]]
    pieces = [(a, b, *shared) for a, b in zip(bounds, bounds[1:], strict=False)]
    run_in_threads(kernel, pieces)


def _num_threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // MIN_PRODUCTS_PER_THREAD))


def _equal_parts(count: int, num: int) -> list[tuple[int, int]]:
    num = max(1, min(num, count))
    ends = [count * i // num for i in range(num + 1)]
    return list(zip(ends, ends[1:], strict=False))
