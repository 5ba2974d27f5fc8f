"""How many values has each tensor's codebook? By the bits they take and the loss that they cost.

Rounding weights by d raises a trained model's loss by about half the sum of F d^2, F the mean
square of each weight's gradient (the diagonal of the empirical Fisher matrix). Of all ways to spend
a number of bits the one with the smallest such sum is found on the lower convex hulls of the
tensors' curves (Shoham, Gersho 1988): the next step goes where a bit buys most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from packlight.compress.errors import CalibrationError, TargetError
from packlight.compress.layers import places_of
from packlight.compress.share import start_values

# (bits, error, number of values), fewest bits first.
_Curve = list[tuple[float, float, int]]


def squared_gradients(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    batches: Iterable[Any],
    names: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the mean over batches of each weight's squared gradient, in the weight's shape.

    Args:
        model: its gradients are overwritten, and None afterwards.
        loss_fn: as for `packlight.fit`.
        batches: of calibration data; the smaller each is, the nearer the mean is to that over
            examples, which is meant.
        names: of parameters; None is all of two dims and more.

    Raises:
        CompressionError: no such parameter.
        CalibrationError: no batches.
    """
    places = places_of(model, names)
    squares = {place.name: torch.zeros_like(place.stored).detach() for place in places}
    num_batches = 0
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        for place in places:
            if place.stored.grad is not None:
                squares[place.name].addcmul_(place.stored.grad, place.stored.grad)
        num_batches += 1
    model.zero_grad()
    if not num_batches:
        raise CalibrationError("squared_gradients")
    return {name: square / num_batches for name, square in squares.items()}


def choose_num_values(
    model: nn.Module,
    code_bytes: int,
    *,
    importance: Mapping[str, torch.Tensor] | None = None,
    candidates: Iterable[int] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256),
    names: Iterable[str] | None = None,
    start: str = "optimal",
) -> dict[str, int]:
    """Return how many values each tensor's codebook is to have, for `share`.

    Args:
        model: pruned; it stays as it is.
        code_bytes: what the codes of weights other than zero may take, by their entropy, with the
            tables of values (two bytes each). Where weights are comes on top.
        importance: by name, what a squared rounding error of each weight costs; from
            `squared_gradients`. Else all cost the same.
        candidates: numbers of values.
        names: of parameters; None is all of two dims and more.
        start: how values are found; see `share`.

    Raises:
        TargetError: `code_bytes` does not suffice for the fewest values; it says what would.
        CompressionError: no such parameter.

    >>> model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    >>> importance = {"0.weight": torch.ones(16, 16), "1.weight": 100 * torch.ones(16, 16)}
    >>> counts = choose_num_values(model, 200, importance=importance)
    >>> counts["0.weight"] < counts["1.weight"]
    True
    """
    curves: dict[str, _Curve] = {}
    for place in places_of(model, names):
        weights = place.stored.detach()
        costs = importance.get(place.name) if importance is not None else None
        points = [_point(weights, costs, num, start) for num in sorted(set(candidates))]
        curves[place.name] = _lower_hull(points)
    target_bits = 8 * code_bytes
    spent_bits = sum(curve[0][0] for curve in curves.values())
    if spent_bits > target_bits:
        raise TargetError("codes", code_bytes, int(spent_bits / 8) + 1, "the fewest values")
    chosen = dict.fromkeys(curves, 0)
    steps = sorted(
        (
            ((curve[i][1] - curve[i + 1][1]) / (curve[i + 1][0] - curve[i][0]), name, i)
            for name, curve in curves.items()
            for i in range(len(curve) - 1)
        ),
        key=lambda step: -step[0],
    )
    for _, name, index in steps:
        curve = curves[name]
        more_bits = curve[index + 1][0] - curve[index][0]
        # A tensor whose next step is too dear takes none of its later ones.
        if chosen[name] == index and spent_bits + more_bits <= target_bits:
            chosen[name] = index + 1
            spent_bits += more_bits
    return {name: curves[name][index][2] for name, index in chosen.items()}


def _point(
    weights: torch.Tensor, costs: torch.Tensor | None, num: int, start: str
) -> tuple[float, float, int]:
    own = weights[weights != 0].double()
    values = start_values(own, num, start)
    if not len(values):
        return 0.0, 0.0, num
    codes = torch.bucketize(own, (values[1:] + values[:-1]) / 2)
    squares = (own - values[codes]).square()
    if costs is not None:
        squares = squares * costs[weights != 0]
    shares = torch.bincount(codes, minlength=len(values)).double() / len(own)
    entropy = float(torch.special.entr(shares).sum()) / math.log(2)
    return len(own) * entropy + 16 * len(values), float(squares.sum()), num


def _lower_hull(points: _Curve) -> _Curve:
    """Return the points that are best at some price of a bit, fewest bits first."""
    hull: _Curve = []
    for bits, error, num in sorted(points):
        if hull and error >= hull[-1][1]:
            continue
        while hull and (
            hull[-1][0] == bits
            or (
                len(hull) > 1
                and (hull[-2][1] - hull[-1][1]) * (bits - hull[-1][0])
                <= (hull[-1][1] - error) * (hull[-1][0] - hull[-2][0])
            )
        ):
            hull.pop()
        hull.append((bits, error, num))
    return hull
