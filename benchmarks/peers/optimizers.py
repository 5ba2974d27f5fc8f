"""Optimizers that a row may have: torch's own, one for each parameter, and those in few bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.models import ADAMW_RATE, MOMENTUM, SGD_RATE, MakeOptimizer, adamw

TORCH = "torch"
EACH = "one for each parameter"
BITSANDBYTES = "bitsandbytes 8-bit"
TORCHAO = "torchao 8-bit"
# Weights in bfloat16 are rounded stochastically.
PACKLIGHT = "packlight.optim 8-bit"

Optimizers = list[torch.optim.Optimizer]


def make_optimizers(choice: str, plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    """Return a model's optimizers.

    Args:
        choice: one of the names above.
        plain: what the model is trained with otherwise; `adamw` or SGD with momentum.
        model: whose parameters they train.

    Raises:
        ImportError: the library is not installed.
    """
    return _MAKERS[choice](plain, model)


def _torch(plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    return [plain(model)]


def _each(plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    return [plain(nn.ParameterList([p])) for p in model.parameters()]


def _bitsandbytes(plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    import bitsandbytes

    if plain is adamw:
        return [bitsandbytes.optim.AdamW8bit(model.parameters(), lr=ADAMW_RATE)]
    return [bitsandbytes.optim.SGD8bit(model.parameters(), lr=SGD_RATE, momentum=MOMENTUM)]


def _torchao(plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    import torchao.optim

    assert plain is adamw, "torchao has no SGD in 8 bits"
    return [torchao.optim.AdamW8bit(model.parameters(), lr=ADAMW_RATE)]


def _packlight(plain: MakeOptimizer, model: nn.Module) -> Optimizers:
    from packlight.optim import AdamW8bit, SGD8bit

    groups = []
    for dtype, weights in ((torch.float32, "fp32"), (torch.bfloat16, "bf16-stochastic")):
        found = [p for p in model.parameters() if p.dtype is dtype]
        groups += [{"params": found, "weights": weights}] if found else []
    if plain is adamw:
        return [AdamW8bit(groups, lr=ADAMW_RATE)]
    return [SGD8bit(groups, lr=SGD_RATE, momentum=MOMENTUM)]


_MAKERS: dict[str, Callable[[MakeOptimizer, nn.Module], Optimizers]] = {
    TORCH: _torch, EACH: _each, BITSANDBYTES: _bitsandbytes, TORCHAO: _torchao,
    PACKLIGHT: _packlight,
}
