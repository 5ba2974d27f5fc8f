"""The optimizers: Packlight's combinations, torch's own, and other libraries' low-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from packlight.optim import WEIGHT_FORMATS, LowBit, Rule, adamw, lion, sgd

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
        make: parameters -> optimizer; it imports its library.
        dtype: of the parameter.
    """

    tool: str
    name: str
    make: Make
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        """What the command line calls it."""
        return f"{self.tool}: {self.name}"


def fused_adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return what all are compared with."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _low_bit(rule: Rule, states: str, weights: str) -> Case:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return LowBit(parameters, rule, states, weights)

    name = f"{rule.name}, states {states}, weights {weights}"
    return Case("packlight", name, make, WEIGHT_FORMATS[weights].dtype)


def _of_library(module: str, name: str, **options: Any) -> Case:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        library = __import__(module, fromlist=[name])
        made = getattr(library, name)(parameters, lr=LEARNING_RATE, **options)
        assert isinstance(made, torch.optim.Optimizer)
        return made

    words = ", ".join([name, *(f"{option}={value}" for option, value in options.items())])
    return Case(module.split(".")[0], words, make)


_ADAMW, _LION = adamw(LEARNING_RATE), lion(LEARNING_RATE)
_MOMENTUM = sgd(LEARNING_RATE, 0.9)

ALL = [
    _of_library("torch.optim", "AdamW", fused=True),
    _of_library("torch.optim", "AdamW"),
    _of_library("torch.optim", "Adafactor"),
    *(_low_bit(_ADAMW, states, "fp32") for states in ("fp32", "bf16", "8bit", "4bit")),
    *(_low_bit(_ADAMW, "8bit", weights) for weights in WEIGHT_FORMATS if weights != "fp32"),
    _low_bit(_LION, "8bit", "fp32"),
    _low_bit(_MOMENTUM, "8bit", "fp32"),
    _of_library("bitsandbytes.optim", "AdamW8bit"),
    _of_library("torchao.optim", "AdamW8bit"),
    _of_library("torchao.optim", "AdamW4bit"),
]

CASES = {case.key: case for case in ALL}
