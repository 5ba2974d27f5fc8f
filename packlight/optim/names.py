"""Short names for usual combinations. Each is `LowBit` with some of its arguments chosen."""

from __future__ import annotations

from typing import Any

from packlight.optim.low_bit import LowBit
from packlight.optim.rules import adamw, lion, sgd


class AdamW8bit(LowBit):
    """AdamW whose moments take 8 bits (Dettmers et al. 2021): 2.03 bytes per parameter for 8.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: see `packlight.optim.adamw`.
        options: `weights`, `seed`, `maximize`; see `LowBit`.
    """

    _STATES = "8bit"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, adamw(lr, betas, eps, weight_decay), self._STATES, **options)


class AdamW4bit(AdamW8bit):
    """AdamW whose moments take 4 bits (Li et al. 2023): 1.06 bytes per parameter for 8.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: see `packlight.optim.adamw`.
        options: `weights`, `seed`, `maximize`; see `LowBit`.
    """

    _STATES = "4bit"


class Lion8bit(LowBit):
    """Lion (Chen et al. 2023) whose moment takes 8 bits: 1.02 bytes per parameter for 4.

    Args:
        params: parameters or groups of them.
        lr, betas, weight_decay: see `packlight.optim.lion`.
        options: `weights`, `seed`, `maximize`; see `LowBit`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lion(lr, betas, weight_decay), "8bit", **options)


class SGD8bit(LowBit):
    """SGD whose momentum takes 8 bits: 1.02 bytes per parameter for 4.

    Args:
        params: parameters or groups of them.
        lr, momentum, nesterov, weight_decay: see `packlight.optim.sgd`.
        options: `weights`, `seed`, `maximize`; see `LowBit`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, sgd(lr, momentum, nesterov, weight_decay), "8bit", **options)
