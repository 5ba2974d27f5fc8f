"""Functions whose backward keeps less: drop-in for those of `torch.nn.functional`.

Forwards are exact. Activations keep a few bits of each element, see `few_bit.py`; linear layers
keep a sketch of their input, see `sketch.py`. Functions whose derivative has two values (relu,
relu6, leaky_relu, hardtanh, hardsigmoid) are exact in one bit and take no `bits`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from packlight.errors import OptionError, UnsupportedModelError
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
from packlight.lossy.sketch import num_kept_rows, sketch_again, sketch_rows


class _FewBit(torch.autograd.Function):
    """A function's result, with its derivative's steps kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, result: torch.Tensor, edges: list[float], codes: list[int],
        levels: list[float], num_bits: int,
    ) -> torch.Tensor:
        stride = x.stride() if is_dense(x) else x.contiguous().stride()
        ctx.save_for_backward(derivative_codes(x, edges, codes, num_bits, stride))
        ctx.levels, ctx.num_bits, ctx.stride = levels, num_bits, stride
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_second()  # (a gradient of ones would come out as a constant)
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        made = times_derivative(gradient, kept, ctx.levels, ctx.num_bits, ctx.stride)
        return made, None, None, None, None, None


def _applied(x: torch.Tensor, result: torch.Tensor, table: Table) -> torch.Tensor:
    made: torch.Tensor = _FewBit.apply(  # type: ignore[no-untyped-call]
        x, result, list(table.edges), list(table.codes), list(table.levels), table.num_bits
    )
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


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    fraction: float = 0.2, kind: str = "winners", seed: int = 0,
) -> torch.Tensor:
    """Return x times the transposed weight, plus the bias.

    The gradients of x and of the bias are exact, that of the weight is right on average.

    Args:
        x: of shape (..., in features).
        weight: (out features, in features).
        bias: (out features,).
        fraction: of the rows of x that the sketch has.
        kind: "winners", "rows", "gaussian" or "rademacher".
        seed: random bits depend on it and on x: layers with the same input want different ones.

    Raises:
        OptionError: a fraction that is not between 0 and 1, an unknown kind.
        UnsupportedModelError: it is differentiated twice.
    """
    made: torch.Tensor = _Sketched.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, fraction, kind, seed
    )
    return made


class _Sketched(torch.autograd.Function):
    """A linear layer that keeps a sketch of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        fraction: float, kind: str, seed: int,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.count, ctx.kind = num_kept_rows(len(rows), fraction), kind
        ctx.save_for_backward(weight, *sketch_rows(rows, ctx.count, kind, seed))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedModelError(
                "a randomized linear layer cannot be differentiated twice: its input is gone\n"
                "hint: torch.nn.functional.linear can be"
            )
        (gradient,) = gradients
        weight, kept, state, factors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = None
        if needs_weight:
            of_weight = sketch_again(rows, ctx.count, ctx.kind, state, factors).t() @ kept
        return (
            gradient @ weight if needs_x else None, of_weight,
            rows.sum(0) if needs_bias else None, None, None, None,
        )
