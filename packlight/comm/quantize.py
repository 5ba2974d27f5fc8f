"""All elements of a gradient in 8, 4, 2 or 1 bits, or in thirds of a level: codes and scales.

An element x of a block with scale s is sent as the integer nearest to x L / s, or one of the two
next to it at random so that it is right on average, from -L to L:

| | bits | L | scale | rounded |
| --- | --- | --- | --- | --- |
| `Quantize` | 8, 4, 2 | 127, 7, 1 | largest magnitude | to nearest, or at random |
| `Quantize` | 1 | sign only | mean magnitude | - |
| `QSGD` (Alistarh et al. 2017) | 8, 4, 2 | 127, 7, 1 | Euclidean norm | at random |
| `Ternary` (Wen et al. 2017) | 1.6 | 1 | largest magnitude of the whole tensor | at random |
| `Sign` (Bernstein et al. 2018) | 1 | sign only, the majority's | 1 | - |
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from packlight.comm.compressor import Compressor, Message, State
from packlight.comm.packing import Bytes, Reader, kernels, read_symbols, write_symbols
from packlight.errors import OptionError

_LEVELS = {8: 127, 4: 7, 2: 1, 1: 0}
TRITS_PER_BYTE = 5


@dataclass(frozen=True)
class _Codes:
    """How codes lie in bytes and what they stand for; see `kernels.quantize`."""

    norm: int
    levels: int
    per_byte: int
    base: int
    is_random: bool


class _Blocks(Compressor):
    """Codes, with a scale for each block; entropy-coded if asked for."""

    block: int
    entropy: bool
    seed: int

    def _codes(self) -> _Codes:
        raise NotImplementedError

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return what random bits depend on: the parameter's and rank's key, and a count."""
        key = zlib.crc32(struct.pack("<3Q", self.seed % 2**64, number, rank))
        return {"step": 0, "key": key}

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return all codes and scales."""
        flat = gradient.reshape(-1).numpy()
        form, block = self._codes(), self._block(len(flat))
        per_byte, base = (1, 256) if self.entropy else (form.per_byte, form.base)
        scales = np.empty(-(-len(flat) // block), np.float32)
        packed = np.empty(kernels().packed_bytes(len(flat), block, per_byte), np.uint8)
        kernels().quantize(
            flat, block, form.norm, form.levels, form.is_random, state["key"], state["step"],
            per_byte, base, scales, packed,
        )
        if self.entropy and len(flat):
            packed = write_symbols(packed, 2 * max(form.levels, 1) + 1)
        payload = np.concatenate([scales.view(np.uint8), packed])
        message = Message(torch.from_numpy(payload), gradient.shape)
        return message, {**state, "step": (state["step"] + 1) % 2**32}

    def _add(self, message: Message, total: torch.Tensor) -> None:
        form, block = self._codes(), self._block(total.numel())
        reader = Reader(message.payload.numpy())
        scales = reader.floats(-(-total.numel() // block))
        per_byte, base = (1, 256) if self.entropy else (form.per_byte, form.base)
        packed: Bytes
        if self.entropy:
            packed = read_symbols(reader, 2 * max(form.levels, 1) + 1)
        else:
            packed = reader.take(kernels().packed_bytes(total.numel(), block, per_byte))
        kernels().add_dequantized(
            packed, scales, block, form.levels, per_byte, base, total.numpy()
        )

    def _block(self, num_elements: int) -> int:
        return self.block or -(-max(num_elements, 1) // 256) * 256

    def _check(self, bits: int, known: Sequence[int]) -> None:
        if bits not in known:
            raise OptionError(f"bits={bits!r}; known: {', '.join(map(str, known))}")
        if self.block < 0 or self.block % 256:
            raise OptionError(
                f"block={self.block!r}; it must be a multiple of 256, or 0 for the whole tensor"
            )


@dataclass(frozen=True)
class Quantize(_Blocks):
    """Multiples of a share of the largest magnitude in each block.

    Attributes:
        bits: 8, 4, 2 or 1. One bit is the sign, and the mean magnitude for all (1-bit SGD with the
            scale of Karimireddy et al. 2019).
        block: how many elements share a scale, a multiple of 256; 0 for all.
        stochastic: round at random, unbiased; else to nearest, a contraction.
        entropy: code symbols by how often they occur; needs constriction, and pays where most are
            zero.
        seed: of random rounding.

    Raises:
        OptionError: a number that it does not take.
    """

    bits: int = 8
    block: int = 256
    stochastic: bool = False
    entropy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(self.bits, tuple(_LEVELS))
        if self.bits == 1 and self.stochastic:
            raise OptionError(
                "one bit with the mean magnitude cannot be rounded at random: elements above the "
                "mean would not be right on average\nhint: Ternary, or bits=2"
            )

    @property
    def is_contraction(self) -> bool:  # type: ignore[override]
        """Whether it rounds to nearest: zero is a level, so no element gets worse."""
        return not self.stochastic

    @property
    def is_unbiased(self) -> bool:  # type: ignore[override]
        """Whether it rounds at random."""
        return self.stochastic

    def _codes(self) -> _Codes:
        norm = kernels().MEAN_MAGNITUDE if self.bits == 1 else kernels().LARGEST
        return _Codes(norm, _LEVELS[self.bits], 8 // self.bits, 2**self.bits, self.stochastic)


@dataclass(frozen=True)
class QSGD(_Blocks):
    """Multiples of a share of each block's Euclidean norm, rounded at random.

    Quantized SGD (Alistarh et al. 2017). Most codes are zero, which entropy coding makes use of
    (the paper's Elias code).

    Attributes:
        bits: 8, 4 or 2, for 127, 7 or 1 levels beside zero.
        block, entropy, seed: see `Quantize`.

    Raises:
        OptionError: a number that it does not take.
    """

    bits: int = 4
    block: int = 256
    entropy: bool = False
    seed: int = 0
    is_unbiased = True

    def __post_init__(self) -> None:
        self._check(self.bits, (8, 4, 2))

    def _codes(self) -> _Codes:
        return _Codes(
            kernels().EUCLIDEAN, _LEVELS[self.bits], 8 // self.bits, 2**self.bits, is_random=True
        )


@dataclass(frozen=True)
class Ternary(_Blocks):
    """The largest magnitude, its negative or zero, at random (Wen et al. 2017): five to a byte.

    Attributes:
        block: how many elements share a scale; 0, the paper's, for the whole tensor.
        entropy, seed: see `Quantize`.

    Raises:
        OptionError: a number that it does not take.
    """

    block: int = 0
    entropy: bool = False
    seed: int = 0
    is_unbiased = True

    def __post_init__(self) -> None:
        self._check(2, (2,))

    def _codes(self) -> _Codes:
        return _Codes(kernels().LARGEST, 1, TRITS_PER_BYTE, 3, is_random=True)


@dataclass(frozen=True)
class Sign(Compressor):
    """The sign of each element; the average is the majority's sign, 0 where there is none.

    signSGD with majority vote (Bernstein et al. 2018). Its steps are as long as the learning rate,
    whatever the gradient. Error feedback cannot go with it: use `Quantize(bits=1)` there.
    """

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return a bit for each element, set where it is negative."""
        flat = gradient.reshape(-1).numpy()
        return Message(torch.from_numpy(np.packbits(flat < 0)), gradient.shape), state

    def combine(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return 1, 0 or -1 for each element."""
        total = torch.zeros(messages[0].shape)
        for message in messages:
            if message.payload.numel():
                self._add(message, total.view(-1))
        return total.sign_()

    def _add(self, message: Message, total: torch.Tensor) -> None:
        bits = np.unpackbits(message.payload.numpy(), count=total.numel())
        total += torch.from_numpy(1 - 2 * bits.astype(np.float32))
