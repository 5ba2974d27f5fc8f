"""Stages and their replicas on a chain, for machines within machines: PipeDream's planner, exact.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, 3.1. On
level k, m_k components of level k - 1 are joined at B_k bytes per second:

    T_k(i..j, m) = 1/m max(A_{k-1}(i..j, m_{k-1}), 2 (m - 1) sum(parameters)/B_k)
    A_k(i..j, m) = min(T_k(i..j, m),
                       min over s, m' of max(A_k(i..s, m - m'), 2 a_s/B_k, T_k(s+1..j, m')))

the time of a microbatch in the slowest stage, of layers i..j on m components. Level 0 is a device,
which takes the sum of its layers' seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class ChainLayer:
    """A layer of a chain.

    Attributes:
        seconds: of one microbatch, forward and backward.
        output_bytes, parameter_bytes: what it hands on, and what replicas exchange.
    """

    seconds: float
    output_bytes: float
    parameter_bytes: float


@dataclass(frozen=True, slots=True)
class Replicated:
    """Layers [start, end) on so many components; `inside` says how each of those runs them."""

    start: int
    end: int
    components: int
    inside: tuple[Replicated, ...] = ()


def pipedream_stages(
    layers: Sequence[ChainLayer], levels: Sequence[tuple[int, float]]
) -> tuple[float, tuple[Replicated, ...]]:
    """Return the seconds of the slowest stage, and the stages.

    Args:
        layers: the chain.
        levels: from the innermost: (components, bytes per second between them).
    """
    total = [0.0]
    weights = [0.0]
    for layer in layers:
        total.append(total[-1] + layer.seconds)
        weights.append(weights[-1] + layer.parameter_bytes)

    @cache
    def whole(k: int, i: int, j: int, m: int) -> float:
        """Return T_k of layers [i, j): one stage on m components."""
        _, speed = levels[k - 1]
        inner = levels[k - 2][0] if k > 1 else 1
        exchange = 2 * (m - 1) * (weights[j] - weights[i]) / speed
        return max(best(k - 1, i, j, inner)[0], exchange) / m

    @cache
    def best(k: int, i: int, j: int, m: int) -> tuple[float, int, int]:
        """Return A_k of layers [i, j), and (s, m') of its last cut; s = i for none."""
        if k == 0:
            return total[j] - total[i], i, 1
        _, speed = levels[k - 1]
        found = (whole(k, i, j, m), i, m)
        for s in range(i + 1, j):
            crossing = 2 * layers[s - 1].output_bytes / speed
            if crossing >= found[0]:
                continue
            for last in range(1, m):
                seconds = max(best(k, i, s, m - last)[0], crossing, whole(k, s, j, last))
                found = min(found, (seconds, s, last))
        return found

    def read(k: int, i: int, j: int, m: int) -> tuple[Replicated, ...]:
        if k == 0:
            return ()
        _, s, last = best(k, i, j, m)
        inner = levels[k - 2][0] if k > 1 else 1
        stage = Replicated(s, j, last, read(k - 1, s, j, inner))
        return (stage,) if s == i else (*read(k, i, s, m - last), stage)

    top, count = len(levels), levels[-1][0]
    return best(top, 0, len(layers), count)[0], read(top, 0, len(layers), count)
