"""All elements of a gradient, as they are or in half of the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from packlight.comm.compressor import Compressor, Message, State
from packlight.errors import OptionError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Dense(Compressor):
    """Every element, in fp32, bf16 or fp16.

    fp32 is summed on the way, as DDP does. The others are rounded once, then averaged in float32,
    which torch's fp16 hook does in fp16.

    Attributes:
        dtype: "fp32", "bf16" or "fp16".

    Raises:
        OptionError: another dtype.
    """

    dtype: str = "fp32"
    is_contraction = True
    is_unbiased = True  # but for the last bit's rounding

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise OptionError(f"unknown dtype={self.dtype!r}; known: {', '.join(_DTYPES)}")

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return all of a gradient."""
        flat = gradient.reshape(-1)
        if self.dtype == "fp32":
            return Message(flat, gradient.shape, is_linear=True), state
        return Message(flat.to(_DTYPES[self.dtype]).view(torch.uint8), gradient.shape), state

    def _add(self, message: Message, total: torch.Tensor) -> None:
        total += message.payload.view(_DTYPES[self.dtype])
