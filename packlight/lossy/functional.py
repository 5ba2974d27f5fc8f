"""Activations whose backward keeps a few bits of each element: drop-in for `torch.nn.functional`.

The forward is exact. See `few_bit.py` for the method. Functions whose derivative has two values
(relu, relu6, leaky_relu, hardtanh, hardsigmoid) are exact in one bit and take no `bits`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from packlight.errors import OptionError
from packlight.lossy.arrays import is_dense
from packlight.lossy.few_bit import (
    Table,
    above,
    between,
    derivative_codes,
    optimal_table,
    refuse_second,
    times_derivative,
)


class _FewBit(torch.autograd.Function):
    """A function's result, with its derivative's steps kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, result: torch.Tensor, table: Table) -> torch.Tensor:
        stride = x.stride() if is_dense(x) else x.contiguous().stride()
        ctx.save_for_backward(
            derivative_codes(x, table.edges, table.codes, table.num_bits, stride)
        )
        ctx.table, ctx.stride = table, stride
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_second()  # (a gradient of ones would come out as a constant)
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        table: Table = ctx.table
        made = times_derivative(gradient, kept, table.levels, table.num_bits, ctx.stride)
        return made, None, None


def _applied(x: torch.Tensor, result: torch.Tensor, table: Table) -> torch.Tensor:
    made: torch.Tensor = _FewBit.apply(x, result, table)  # type: ignore[no-untyped-call]
    return made


def gelu(x: torch.Tensor, approximate: str = "none", bits: int = 3) -> torch.Tensor:
    """Return GELU.

    Args:
        x: float32, bfloat16 or float16, of any shape.
        approximate: "none" or "tanh".
        bits: kept of each element, 1 to 4.

    Raises:
        OptionError: other bits, or another dtype.
        UnsupportedModelError: it is differentiated twice.

    >>> x = torch.tensor([-3.0, 0.5, 3.0], requires_grad=True)
    >>> gelu(x).sum().backward()
    >>> [round(float(g), 1) for g in x.grad]
    [-0.0, 0.9, 1.0]
    """
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    with torch.no_grad():
        result = F.gelu(x, approximate=approximate)
    return _applied(x, result, optimal_table(name, bits))


def silu(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return SiLU; arguments and errors as `gelu`."""
    return _plain("silu", x, bits)


def mish(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return Mish; arguments and errors as `gelu`."""
    return _plain("mish", x, bits)


def selu(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return SELU; arguments and errors as `gelu`."""
    return _plain("selu", x, bits)


def tanh(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return tanh; arguments and errors as `gelu`."""
    return _plain("tanh", x, bits)


def sigmoid(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return the logistic function; arguments and errors as `gelu`."""
    return _plain("sigmoid", x, bits)


def hardswish(x: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Return Hardswish; arguments and errors as `gelu`."""
    return _plain("hardswish", x, bits)


def elu(x: torch.Tensor, alpha: float = 1.0, bits: int = 3) -> torch.Tensor:
    """Return ELU; arguments and errors as `gelu`.

    Args:
        x: as `gelu`'s.
        alpha: 1; there is no table for others.
        bits: as `gelu`'s.
    """
    if alpha != 1:
        raise OptionError(
            f"there is no table of the derivative of elu with alpha={alpha!r}\nhint: there is one "
            "for alpha=1; celu has one for every alpha"
        )
    return _plain("elu", x, bits)


def celu(x: torch.Tensor, alpha: float = 1.0, bits: int = 3) -> torch.Tensor:
    """Return CELU; arguments and errors as `gelu`."""
    with torch.no_grad():
        result = F.celu(x, alpha)
    return _applied(x, result, optimal_table("elu", bits).scaled(1 / alpha, alpha))


def softplus(x: torch.Tensor, beta: float = 1.0, bits: int = 3) -> torch.Tensor:
    """Return softplus; arguments and errors as `gelu`."""
    with torch.no_grad():
        result = F.softplus(x, beta)
    return _applied(x, result, optimal_table("softplus", bits).scaled(beta, 1 / beta))


def relu(x: torch.Tensor) -> torch.Tensor:
    """Return ReLU; exact in one bit, where torch keeps the result."""
    with torch.no_grad():
        result = F.relu(x)
    return _applied(x, result, above(0.0, 1.0))


def relu6(x: torch.Tensor) -> torch.Tensor:
    """Return ReLU6; exact in one bit."""
    return hardtanh(x, 0.0, 6.0)


def leaky_relu(x: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """Return leaky ReLU; exact in one bit."""
    with torch.no_grad():
        result = F.leaky_relu(x, negative_slope)
    return _applied(x, result, above(0.0, 1.0, negative_slope))


def hardtanh(x: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0) -> torch.Tensor:
    """Return hardtanh; exact in one bit."""
    with torch.no_grad():
        result = F.hardtanh(x, min_val, max_val)
    return _applied(x, result, between(min_val, max_val, inside=1.0, outside=0.0))


def hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return hardsigmoid; exact in one bit, up to rounding."""
    with torch.no_grad():
        result = F.hardsigmoid(x)
    return _applied(x, result, between(-3.0, 3.0, inside=1 / 6, outside=0.0))


def _plain(name: str, x: torch.Tensor, bits: int) -> torch.Tensor:
    function = getattr(torch, name, None) or getattr(F, name)
    with torch.no_grad():
        result = function(x)
    return _applied(x, result, optimal_table(name, bits))
