"""The best piecewise-constant derivatives, by dynamic programming; writes `tables.json`.

Novikov et al. 2022, "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory
Footprint Reduction": of all step functions with 2^b steps, the one nearest a derivative f' in
squared L2 distance on [-10, 10]. On a grid, with prefix integrals F of f' (that is f itself) and Q
of f'^2, a step from x to y costs Q(y) - Q(x) - (F(y) - F(x))^2 / (y - x), at the level
(F(y) - F(x)) / (y - x). The least sum over k steps that end at a point follows from that over
k - 1 steps. Two things differ from the paper: the grid is refined around the edges that a coarser
one found, and a function whose derivative jumps has a point of the grid there.

    python -m packlight.lossy.levels
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], Floats]

BITS = (1, 2, 3, 4)
EDGE = 10.0
PATH = Path(__file__).with_name("tables.json")
_COARSE = 1000  # intervals
_FINE = 60  # points around each edge that was found, in a refinement
_REFINEMENTS = 2
# Simpson's rule between neighbours of the grid, in so many pieces.
_PIECES = 16


def best_steps(
    function: Function, derivative: Function, num_steps: int, jumps: tuple[float, ...] = ()
) -> tuple[Floats, Floats, float]:
    """Return the step function that is nearest to a derivative on [-10, 10].

    Args:
        function: elementwise, on float64.
        derivative: its derivative.
        num_steps: of the step function.
        jumps: where the derivative is not continuous.

    Returns:
        the `num_steps` - 1 inner edges, the levels between them, the squared L2 error.
    """
    grid = np.unique(np.concatenate([np.linspace(-EDGE, EDGE, _COARSE + 1), jumps]))
    width = 2 * EDGE / _COARSE
    for refinement in range(_REFINEMENTS + 1):
        ends = _best_ends(grid, function, derivative, num_steps)
        edges = grid[ends]
        if refinement < _REFINEMENTS:
            around = np.linspace(-width, width, 2 * _FINE + 1)
            points = (edges[1:-1, None] + around).reshape(-1)
            inside = points[(points > -EDGE) & (points < EDGE)]
            grid = np.unique(np.concatenate([[-EDGE, EDGE], edges, inside, jumps]))
            width /= _FINE
    levels = np.diff(function(edges)) / np.diff(edges)
    return edges[1:-1], levels, _squared_error(edges, levels, derivative, jumps)


def _best_ends(
    grid: Floats, function: Function, derivative: Function, num_steps: int
) -> npt.NDArray[np.int64]:
    """Return the places in the grid where the best steps end, both ends of the grid included."""
    integral = function(grid)
    squares = np.concatenate([[0.0], np.cumsum(_squares(grid, derivative))])
    width = grid[None, :] - grid[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = squares[None, :] - squares[:, None]
        cost -= (integral[None, :] - integral[:, None]) ** 2 / width
    cost[width <= 0] = np.inf
    least, previous = cost[0].copy(), []
    for _ in range(num_steps - 1):
        sums = least[:, None] + cost
        previous.append(sums.argmin(0))
        least = sums.min(0)
    ends = [len(grid) - 1]
    for come_from in reversed(previous):
        ends.append(int(come_from[ends[-1]]))
    return np.array([0, *reversed(ends)])


def _squares(grid: Floats, derivative: Function) -> Floats:
    """Return the integral of the squared derivative between neighbours of a grid."""
    share = np.linspace(0, 1, _PIECES + 1)
    weight = np.where(np.arange(_PIECES + 1) % 2, 4.0, 2.0)
    weight[[0, -1]] = 1.0
    # One-sided at both ends, since a derivative may jump at a point of the grid.
    share[0], share[-1] = 1e-12, 1 - 1e-12
    points = grid[:-1, None] + np.diff(grid)[:, None] * share
    return np.asarray((derivative(points) ** 2 @ weight) * np.diff(grid) / (3 * _PIECES))


def _squared_error(
    edges: Floats, levels: Floats, derivative: Function, jumps: tuple[float, ...]
) -> float:
    grid = np.unique(np.concatenate([np.linspace(-EDGE, EDGE, 20 * _COARSE + 1), edges, jumps]))
    middles = (grid[1:] + grid[:-1]) / 2
    level = levels[np.searchsorted(edges[1:-1], middles)]
    differences = (derivative(middles) - level) ** 2
    return float((differences * np.diff(grid)).sum())


# -- the functions that have a table

_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _softplus(x: Floats) -> Floats:
    return np.asarray(np.logaddexp(0, x))


def _normal(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + _erf(x / math.sqrt(2))))


def _gelu_tanh(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _gelu_tanh_derivative(x: Floats) -> Floats:
    root = math.sqrt(2 / math.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))
    inner = root * (1 + 3 * 0.044715 * x**2)
    return np.asarray(0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner)


def _mish_derivative(x: Floats) -> Floats:
    t = np.tanh(_softplus(x))
    return np.asarray(t + x * (1 - t**2) * _sigmoid(x))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

FUNCTIONS: dict[str, tuple[Function, Function, tuple[float, ...]]] = {
    "gelu": (
        lambda x: x * _normal(x),
        lambda x: _normal(x) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
        (),
    ),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_derivative, ()),
    "silu": (
        lambda x: x * _sigmoid(x),
        lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
        (),
    ),
    "mish": (lambda x: x * np.tanh(_softplus(x)), _mish_derivative, ()),
    "elu": (
        lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))),
        (),
    ),
    "selu": (
        lambda x: _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(np.minimum(x, 0))),
        lambda x: _SELU_SCALE * np.where(x > 0, 1.0, _SELU_ALPHA * np.exp(np.minimum(x, 0))),
        (0.0,),
    ),
    "softplus": (_softplus, _sigmoid, ()),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2, ()),
    "sigmoid": (_sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x)), ()),
    "hardswish": (
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
        lambda x: np.where(x <= -3, 0.0, np.where(x < 3, x / 3 + 0.5, 1.0)),
        (-3.0, 3.0),
    ),
}


def tables() -> dict[str, Any]:
    """Return all tables: function -> bits -> edges, levels and squared error."""
    made: dict[str, Any] = {}
    for name, (function, derivative, jumps) in FUNCTIONS.items():
        for bits in BITS:
            edges, levels, error = best_steps(function, derivative, 2**bits, jumps)
            made.setdefault(name, {})[str(bits)] = {
                "edges": [round(float(x), 9) for x in edges],
                "levels": [round(float(x), 9) for x in levels],
                "squared_error": float(f"{error:.6g}"),
            }
    return made


if __name__ == "__main__":
    PATH.write_text(json.dumps(tables(), indent=1) + "\n")
