"""What a loss divides by, and so the weights with which its microbatches' losses add up to it.

A loss of the form

    loss = sum over terms t of  c_t * N_t / D_t

with N_t a sum over rows and D_t computed from the batch alone has, for rows cut into microbatches,

    loss(batch) = sum over i of  w_i * loss(microbatch i),   w_i = D_t(microbatch i) / D_t(batch)

if that is the same for every term. A mean over rows divides by their number, a sum by 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packlight.errors import MicrobatchError
from packlight.moves.microbatch.batch_value import BatchValue, Leaves, Sums, num_rows_of

RELATIVE_TOLERANCE = 1e-6  # of weights that have to be equal


@dataclass(frozen=True)
class Measure:
    """What a part of a batch adds to a denominator: numbers that add up over parts.

    Attributes:
        num_rows: how many it has.
        sums: per term and factor, what adds up over rows.
    """

    num_rows: int
    sums: Sequence[Sequence[Sums]]

    @property
    def numbers(self) -> list[float]:
        """All of it, to be sent."""
        flat = [s.flatten().tolist() for factors in self.sums for sums in factors for s in sums]
        return [float(self.num_rows), *(number for numbers in flat for number in numbers)]

    def with_numbers(self, numbers: Sequence[float]) -> Measure:
        """Return a measure of the same form with other numbers."""
        left = iter(numbers[1:])

        def like(own: torch.Tensor) -> torch.Tensor:
            values = [next(left) for _ in range(own.numel())]
            return torch.tensor(values, dtype=own.dtype).reshape(own.shape)

        sums = [[[like(s) for s in sums] for sums in factors] for factors in self.sums]
        return Measure(int(numbers[0]), sums)


@dataclass(frozen=True)
class Term:
    """One term of a loss: what its denominator depends on.

    Attributes:
        operation: the node that the term comes from.
        factors: (value, exponent) of the denominator.
        is_mean: whether it divides by the number of rows, too.
    """

    operation: str
    factors: tuple[tuple[BatchValue, int], ...]
    is_mean: bool

    def weights(self, parts: Sequence[Measure], place: int) -> list[float]:
        """Return the weight of each part's loss, by this term's denominator.

        Args:
            parts: what they add to it.
            place: of this term among those that were measured.
        """
        counts = [part.num_rows for part in parts]
        weights = _shares(counts) if self.is_mean else [1.0] * len(parts)
        for index, (value, exponent) in enumerate(self.factors):
            mine, total = value.of_parts([part.sums[place][index] for part in parts], counts)
            if exponent < 0 and 0.0 in mine:
                raise MicrobatchError(f"{value.description} is 0 in a microbatch", self.operation)
            if total == 0:
                raise MicrobatchError(
                    f"{value.description} is 0 in the whole batch: its loss is 0/0",
                    self.operation,
                    "leave this batch out: none of its targets counts",
                )
            weights = [w * (m / total) ** exponent for w, m in zip(weights, mine, strict=True)]
        return weights


@dataclass(frozen=True)
class Denominator:
    """What a loss divides by.

    Attributes:
        terms: those whose denominator is computed from the batch.
        plain: "rows" or "sum" if other terms are means or sums over rows, "" if there are none.
        plain_operation: one of these.
        constant_operation: a term that is the same for every microbatch, or "".
        alternatives: the other denominators that the graph does not rule out.
    """

    terms: tuple[Term, ...]
    plain: str = ""
    plain_operation: str = ""
    constant_operation: str = ""
    alternatives: tuple[Denominator, ...] = ()

    def measure(self, leaves: Leaves) -> Measure:
        """Return what a part of a batch adds to the denominator.

        Args:
            leaves: its tensors, in the order of `tensor_leaves`.
        """
        sums = [[value.sums_of(leaves) for value, _ in term.factors] for term in self.terms]
        return Measure(num_rows_of(leaves), sums)

    def weights(self, parts: Sequence[Measure]) -> list[float]:
        """Return the weights of parts of a batch; one that is 0 says that the part is left out.

        Args:
            parts: what each adds to the denominator.

        Raises:
            MicrobatchError: the terms of the loss would weigh these parts differently.
        """
        found = [(t.operation, t.weights(parts, i)) for i, t in enumerate(self.terms)]
        if self.plain == "sum":
            found.append((self.plain_operation, [1.0] * len(parts)))
        elif self.plain == "rows" or not found:
            found.append((self.plain_operation, _shares([part.num_rows for part in parts])))
        name, weights = found[0]
        for other, different in found[1:]:
            _check_same(name, weights, other, different)
        if self.constant_operation and not _is_close(sum(weights), 1):
            raise MicrobatchError(
                f"it is added once to the loss, and the weights by {name} sum to {sum(weights):g}",
                self.constant_operation,
            )
        return weights

    def describe(self) -> str:
        """Return what the weights are proportional to, for people."""
        values = [v.description for t in self.terms for v, _ in t.factors]
        plain = {"rows": ["the number of rows"], "sum": ["1 (a sum)"], "": []}[self.plain]
        return ", ".join(dict.fromkeys(values + plain)) or "the number of rows"


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / sum(counts) for count in counts]


def _check_same(name: str, weights: list[float], other: str, different: list[float]) -> None:
    for index, (mine, theirs) in enumerate(zip(weights, different, strict=True)):
        if not _is_close(mine, theirs):
            raise MicrobatchError(
                f"microbatch {index} of this batch weighs {mine:g} by {name} and {theirs:g} by "
                f"{other}: their sum has no weights",
                other,
            )


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))
