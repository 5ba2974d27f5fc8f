"""Optimizers as plain formulas in float64, levels as the papers write them, Philox in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Update = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor]


def sgd(lr: float, momentum: float = 0.0, nesterov: bool = False, l2: float = 0.0) -> Update:
    def update(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        g = g + l2 * w
        state["b"] = momentum * state.get("b", torch.zeros_like(w)) + g
        return w - lr * (g + momentum * state["b"] if nesterov else state["b"])

    return update


def adam(
    lr: float, beta1: float, beta2: float, eps: float, l2: float = 0.0, decoupled: float = 0.0
) -> Update:
    def update(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        g = g + l2 * w
        state["m"] = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
        m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        return (1 - lr * decoupled) * w - lr * m / (v.sqrt() + eps)

    return update


def lion(lr: float, beta1: float, beta2: float, decoupled: float) -> Update:
    def update(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        m = state.get("m", torch.zeros_like(w))
        state["m"] = beta2 * m + (1 - beta2) * g
        return (1 - lr * decoupled) * w - lr * (beta1 * m + (1 - beta1) * g).sign()

    return update


def dynamic_levels(bits: int, is_signed: bool) -> np.ndarray:
    """Return the sorted levels of Dettmers' dynamic map, cell by cell."""
    levels = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (i if is_signed else i + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - (bits - 2))
        levels += [*middles, *(-middles if is_signed else ())]
    return np.sort(np.array(levels))


def linear_levels() -> np.ndarray:
    return np.arange(1, 17) / 16


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Return four random words (Salmon et al. 2011, Philox4x32-10)."""
    (a, b, c, d), (k, j) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & 0xFFFFFFFF, (p >> 32) ^ d ^ j, p & 0xFFFFFFFF
        k, j = (k + 0x9E3779B9) & 0xFFFFFFFF, (j + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d
