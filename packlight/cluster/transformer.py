"""A GPT by its sizes: parameters, floating point operations, and what a layer keeps.

The counts are Megatron's: operations from Narayanan et al. (2021, arXiv 2104.04473, appendix),
activations from Korthikanti et al. (2022, arXiv 2205.05198, table 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from packlight.errors import OptionError


class Recompute(StrEnum):
    """What of a layer is computed again in the backward.

    NONE keeps everything; SELECTIVE computes the attention's scores, softmax and dropout again,
    which are large and cheap; FULL keeps the layer's input alone.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Transformer:
    """A decoder of equal layers, with tied embeddings.

    Attributes:
        layers, hidden, heads: its sizes.
        sequence: tokens of a sample.
        vocabulary: rows of the embedding.

    >>> f"{Transformer(96, 12288, 96).parameters / 1e9:.1f}"
    '174.6'
    """

    layers: int
    hidden: int
    heads: int
    sequence: int = 2048
    vocabulary: int = 51200

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.sequence, self.vocabulary)
        if min(sizes) < 1:
            raise OptionError(f"a transformer of {sizes} is none\nhint: all sizes are positive")
        if self.hidden % self.heads:
            raise OptionError(
                f"{self.heads} heads do not divide a hidden size of {self.hidden}\n"
                f"hint: --heads {_divisor_near(self.hidden, self.heads)}"
            )

    @property
    def parameters(self) -> int:
        """Weights, biases, norms and embeddings of tokens and positions."""
        h = self.hidden
        return (
            self.layers * self.layer_parameters + (self.vocabulary + self.sequence) * h + 2 * h
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer: 12 h^2 in matrices, 13 h in biases and norms."""
        return 12 * self.hidden**2 + 13 * self.hidden

    def flops(self, batch: int, recompute: Recompute = Recompute.NONE) -> float:
        """Return the floating point operations of one step's matrix products.

            F = 24 passes b s l h^2 (1 + s / 6h) + 6 b s h V

        With `passes` 4, of which one recomputes, that is the formula behind Megatron's table.

        Args:
            batch: samples.
            recompute: FULL for 4 passes through the layers; otherwise 3, the model's own.
        """
        b, s, n, h, v = batch, self.sequence, self.layers, self.hidden, self.vocabulary
        passes = 4 if recompute is Recompute.FULL else 3
        return 24.0 * passes * b * s * n * h**2 * (1 + s / (6 * h)) + 6.0 * b * s * h * v

    def kept_bytes(
        self, microbatch: int, tensor: int, recompute: Recompute, *, sequence_parallel: bool
    ) -> int:
        """Return what one layer keeps of one microbatch for its backward, on each rank.

            none       s b h (10 + 24 / t + 5 a s / (h t))
            selective  s b h (10 + 24 / t)
            full       2 s b h

        Sequence parallelism divides all of it by t.
        """
        h, s, a = self.hidden, self.sequence, self.heads
        elements = s * microbatch * h
        if recompute is Recompute.FULL:
            return 2 * elements // (tensor if sequence_parallel else 1)
        whole = 10 / (tensor if sequence_parallel else 1) + 24 / tensor
        scores = 5 * a * s / (h * tensor) if recompute is Recompute.NONE else 0.0
        return int(elements * (whole + scores))


def _divisor_near(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
