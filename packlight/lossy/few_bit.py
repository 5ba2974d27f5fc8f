"""Derivatives in one to four bits: forwards are exact, backwards multiply by a step function.

Novikov et al. 2022, "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory
Footprint Reduction". What is kept of an activation's input is the step on which each element is,
in b bits that are b bits. Steps and levels are the best there are (`levels.py`, `tables.json`).
Functions whose derivative has two values are exact in one bit.

A group of 256 elements with one that is not finite gets gradients that are NaN: codes hide nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packlight.errors import OptionError, UnsupportedModelError
from packlight.lossy.arrays import (
    GROUP,
    check_layout,
    compiled,
    laid_out,
    pieces,
    shares,
    words_of,
)
from packlight.threads import run_in_threads

PATH = Path(__file__).with_name("tables.json")
BITS = (1, 2, 3, 4)
# Function -> bits -> edges, levels, squared error.
_TABLES: dict[str, dict[str, dict[str, Any]]] = json.loads(PATH.read_text())


@dataclass(frozen=True)
class Table:
    """A derivative as a step function.

    Attributes:
        edges: between steps, ascending; a step ends with its edge.
        codes: of each step.
        levels: of each code.
        squared_error: L2, on [-10, 10]; 0 for what is exact.
    """

    edges: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]
    squared_error: float

    @property
    def num_bits(self) -> int:
        """Of a code."""
        return max(1, (len(self.levels) - 1).bit_length())

    def scaled(self, inner: float = 1.0, outer: float = 1.0) -> Table:
        """Return the derivative's table of `outer * f(inner * x)`."""
        edges = tuple(edge / inner for edge in self.edges)
        levels = tuple(level * inner * outer for level in self.levels)
        return Table(edges, self.codes, levels, self.squared_error)

    def of_results(self, function: str) -> Table:
        """Return the table for results of a function that rises, in place of its inputs."""
        apply = {"tanh": math.tanh, "sigmoid": lambda x: 1 / (1 + math.exp(-x))}[function]
        edges = tuple(map(apply, self.edges))
        return Table(edges, self.codes, self.levels, self.squared_error)


def optimal_table(function: str, bits: int) -> Table:
    """Return the best table of a function.

    Args:
        function: "gelu", "gelu_tanh", "silu", "mish", "elu", "selu", "softplus", "tanh", "sigmoid"
            or "hardswish".
        bits: 1 to 4.

    Raises:
        OptionError: there is no such table.

    >>> optimal_table("gelu", 2).squared_error < 0.0406
    True
    """
    if function not in _TABLES:
        raise OptionError(
            f"there is no table of the derivative of {function!r}\nhint: there are those of "
            f"{', '.join(_TABLES)}"
        )
    if bits not in BITS:
        raise OptionError(f"a derivative in {bits!r} bits\nhint: 1, 2, 3 or 4 are known")
    found = _TABLES[function][str(bits)]
    return Table(
        tuple(found["edges"]), tuple(range(len(found["levels"]))), tuple(found["levels"]),
        found["squared_error"],
    )


def between(low: float, high: float, inside: float, outside: float) -> Table:
    """Return the exact table of a derivative that is another one strictly between two numbers."""
    return Table((low, math.nextafter(high, -math.inf)), (0, 1, 0), (outside, inside), 0.0)


def above(edge: float, high: float, low: float = 0.0) -> Table:
    """Return the exact table of a derivative that is another one above a number."""
    return Table((edge,), (0, 1), (low, high), 0.0)


def code_bytes(num_elements: int, num_bits: int) -> int:
    """Return how many bytes so many codes take, with a flag for each group."""
    full, rest = divmod(num_elements, GROUP)
    return full + (rest > 0) + num_bits * (full * (GROUP // 8) + -(-rest // 8))


@torch.library.custom_op("packlight::derivative_codes", mutates_args=())
def derivative_codes(
    values: torch.Tensor, edges: Sequence[float], codes: Sequence[int], num_bits: int,
    stride: Sequence[int],
) -> torch.Tensor:
    """Return for each value the code of the step that it is on.

    Args:
        values: float32, bfloat16 or float16, of any shape.
        edges: between steps.
        codes: of each step.
        num_bits: of a code.
        stride: without gaps, in which the values and their gradients are gone through.

    Returns:
        uint8, one-dimensional: see `code_bytes`.
    """
    values = laid_out(values, stride)
    check_layout(values)
    num_elements = values.numel()
    kept = torch.empty(
        code_bytes(num_elements, num_bits), dtype=torch.uint8, device=values.device
    )
    elements = values.as_strided((num_elements,), (1,)).detach()
    # Rounded down: no float32 lies between an edge and its float32 but the edge itself.
    at_edges = _rounded_down(edges)
    code_of = torch.tensor(codes, dtype=torch.int32)
    flags, packed = _parts(kept, num_elements)
    if values.device.type != "cpu":
        _encode_by_operators(elements, at_edges, code_of, num_bits, flags, packed)
        return kept
    kernels, at = compiled(), GROUP // 8 * num_bits
    for first, last in pieces(values):
        piece, shift = words_of(elements[first * GROUP : last * GROUP])
        run_in_threads(kernels.encode, [
            (piece[(a - first) * GROUP : (b - first) * GROUP], shift, at_edges.numpy(),
             code_of.numpy(), num_bits, flags[a:b].numpy(), packed[a * at : b * at].numpy())
            for a, b in shares(first, last)
        ])
    return kept


@derivative_codes.register_fake
def _(
    values: torch.Tensor, edges: Sequence[float], codes: Sequence[int], num_bits: int,
    stride: Sequence[int],
) -> torch.Tensor:
    return values.new_empty(code_bytes(values.numel(), num_bits), dtype=torch.uint8)


@torch.library.custom_op("packlight::times_derivative", mutates_args=())
def times_derivative(
    gradient: torch.Tensor, kept: torch.Tensor, levels: Sequence[float], num_bits: int,
    stride: Sequence[int],
) -> torch.Tensor:
    """Return a gradient times the derivatives behind codes.

    Args:
        gradient: float32, bfloat16 or float16.
        kept: what `derivative_codes` made.
        levels: of each code.
        num_bits: of a code.
        stride: as the codes were made with; the result's.
    """
    gradient = laid_out(gradient, stride)
    check_layout(gradient)
    result = torch.empty_like(gradient)
    num_elements = gradient.numel()
    sources, targets = (t.as_strided((num_elements,), (1,)) for t in (gradient, result))
    at_levels = torch.zeros(2**num_bits)
    at_levels[: len(levels)] = torch.tensor(levels)
    flags, packed = _parts(kept, num_elements)
    if gradient.device.type != "cpu":
        _multiply_by_operators(sources, flags, packed, at_levels, num_bits, targets)
        return result
    kernels, at = compiled(), GROUP // 8 * num_bits
    for first, last in pieces(gradient):
        mine = slice(first * GROUP, last * GROUP)
        source, shift = words_of(sources[mine])
        piece = targets[mine]
        wide = piece.float() if piece.dtype is torch.float16 else piece
        target, _ = words_of(wide)
        run_in_threads(kernels.multiply, [
            (packed[a * at : b * at].numpy(), flags[a:b].numpy(), at_levels.numpy(), num_bits,
             shift > 0, shift, *(
                 words[(a - first) * GROUP : (b - first) * GROUP] for words in (source, target)
             ))
            for a, b in shares(first, last)
        ])
        if wide is not piece:
            piece.copy_(wide)
    return result


@times_derivative.register_fake
def _(
    gradient: torch.Tensor, kept: torch.Tensor, levels: Sequence[float], num_bits: int,
    stride: Sequence[int],
) -> torch.Tensor:
    return torch.empty_strided(
        gradient.shape, stride, dtype=gradient.dtype, device=gradient.device
    )


def refuse_second(*_: object) -> None:
    """Refuse to differentiate a derivative.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        "a few-bit activation cannot be differentiated twice: its derivative is a step function\n"
        "hint: the function of torch.nn.functional can be"
    )


times_derivative.register_autograd(refuse_second)


def _rounded_down(edges: Sequence[float]) -> torch.Tensor:
    exact = torch.tensor(edges, dtype=torch.float64)
    near = exact.float()
    down = torch.nextafter(near, torch.tensor(-math.inf))
    return torch.where(near.double() > exact, down, near)


def _parts(kept: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_groups = -(-num_elements // GROUP)
    return kept[:num_groups], kept[num_groups:]


# -- the same by torch's operators, on any device


def _encode_by_operators(
    elements: torch.Tensor, edges: torch.Tensor, code_of: torch.Tensor, num_bits: int,
    flags: torch.Tensor, packed: torch.Tensor,
) -> None:
    values = elements.float()
    steps = (values[:, None] > edges.to(values.device)).sum(1)
    codes = code_of.to(values.device)[steps].to(torch.uint8)
    finite = torch.nn.functional.pad(values.isfinite(), (0, -len(values) % GROUP), value=True)
    flags.copy_(~finite.view(-1, GROUP).all(1))
    for mine, there, count in _blocks(len(elements), num_bits):
        stride = -(-count // 8)
        padded = torch.nn.functional.pad(codes[mine].view(-1, count), (0, 8 * stride - count))
        padded = padded.view(len(padded), 8, stride)
        planes = packed[there].view(len(padded), num_bits, stride)
        for plane in range(num_bits):
            for k in range(8):
                bits = ((padded[:, k] >> plane) & 1) << k
                planes[:, plane] = bits if k == 0 else planes[:, plane] | bits


def _multiply_by_operators(
    gradient: torch.Tensor, flags: torch.Tensor, packed: torch.Tensor, levels: torch.Tensor,
    num_bits: int, result: torch.Tensor,
) -> None:
    levels = levels.to(gradient.device)
    factors = torch.where(flags > 0, math.nan, 1.0)[:, None]
    shifts = torch.arange(8, device=gradient.device, dtype=torch.uint8)[:, None]
    for mine, there, count in _blocks(len(gradient), num_bits):
        planes = packed[there].view(-1, num_bits, -(-count // 8))
        codes = torch.zeros(len(planes), 8, planes.shape[2], dtype=torch.int64)
        codes = codes.to(gradient.device)
        for plane in range(num_bits):
            codes |= ((planes[:, plane, None] >> shifts) & 1).long() << plane
        of_group = levels[codes.view(len(planes), -1)[:, :count]]
        first = mine.start // GROUP
        of_group *= factors[first : first + len(planes)]
        result[mine] = (gradient[mine].float().view(-1, count) * of_group).view(-1).to(result.dtype)


def _blocks(num_elements: int, num_bits: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield all whole groups, then what is left: elements, bytes, elements of a group."""
    full, rest = divmod(num_elements, GROUP)
    at = full * (GROUP // 8) * num_bits
    if full:
        yield slice(0, full * GROUP), slice(0, at), GROUP
    if rest:
        yield slice(full * GROUP, num_elements), slice(at, None), rest
