"""A gradient as the product of two thin matrices, whose factors are summed on the way.

A gradient of shape [n, ...] is a matrix of n rows. Where it has one dim, or its factors would be no
smaller than itself, it is sent as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod

import torch

from packlight.comm.compressor import Compressor, Message, Reduced, Reduction, State
from packlight.errors import OptionError


class _LowRank(Compressor):
    rank: int
    seed: int
    is_contraction = True
    needs_shape = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError(f"rank={self.rank!r}; it must be a whole number, 1 or larger")

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return the first guess."""
        if not self._is_split(parameter.shape):
            return {}
        return self._first_state(self._random(_matrix_shape(parameter.shape)[1], number))

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return what stands for a gradient: itself where its factors would be no smaller."""
        if not self._is_split(gradient.shape):
            return Message(gradient.reshape(-1), gradient.shape, is_linear=True), state
        return self._factored(gradient, state)

    @abstractmethod
    def _first_state(self, factor: torch.Tensor) -> State:
        """Return the state to begin with."""

    @abstractmethod
    def _factored(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return factors of a gradient, and the next state."""

    def _is_split(self, shape: torch.Size) -> bool:
        rows, columns = _matrix_shape(shape)
        return self.rank * (rows + columns) < rows * columns

    def _random(self, rows: int, number: int) -> torch.Tensor:
        """Return a factor to begin with, the same on all ranks."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randn(rows, self.rank, generator=generator)


@dataclass(frozen=True)
class PowerSGD(_LowRank):
    """One step of the power method on the average gradient M (Vogels et al. 2019, algorithm 1).

        P = mean of M Q,  orthonormal columns;  Q = mean of M^T P;  gradient P Q^T

    in two rounds; Q is the next step's first guess. `compress` alone, where no other rank answers,
    sends both factors of this rank's own gradient.

    Attributes:
        rank: of the product.
        seed: of the first guess.

    Raises:
        OptionError: a rank below 1.
    """

    rank: int = 1
    seed: int = 0

    def _first_state(self, factor: torch.Tensor) -> State:
        return {"right": factor}

    def _factored(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return both factors."""
        matrix = _as_matrix(gradient)
        left = orthonormal(matrix @ state["right"])
        right = matrix.T @ left
        payload = torch.cat([left.reshape(-1), right.reshape(-1)]).view(torch.uint8)
        return Message(payload, gradient.shape), {"right": right}

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks, one factor after the other."""
        if not self._is_split(gradient.shape):
            return (yield from super().reduce(gradient, state))
        matrix = _as_matrix(gradient)
        product = matrix @ state["right"]
        messages = yield Message(product.reshape(-1), gradient.shape, is_linear=True)
        left = orthonormal(messages[0].payload.view_as(product))
        right = matrix.T @ left
        message = Message(right.reshape(-1), gradient.shape, is_linear=True, context=left)
        messages = yield message
        state = {"right": messages[0].payload.view_as(right)}
        return Reduced(self.combine(messages), state, self, message)

    def _add(self, message: Message, total: torch.Tensor) -> None:
        if not self._is_split(message.shape):
            total += message.payload
            return
        rows, columns = _matrix_shape(message.shape)
        left, right = message.context, message.payload
        if left is None:
            both = message.payload.view(torch.float32)
            left, right = both[: rows * self.rank].view(rows, -1), both[rows * self.rank :]
        total.view(rows, columns).addmm_(left, right.view(columns, -1).T)


@dataclass(frozen=True)
class GradZip(_LowRank):
    """Alternating least squares: one factor a step, from the other one of the step before.

    GradZip (Cho et al. 2019) factors the average gradient by alternating minimization. Here, as in
    ACP-SGD (Zhang et al. 2023), the factor that stands is made orthonormal first, the same on all
    ranks, so that the other one is a product and no system has to be solved. One round, half of
    what `PowerSGD` sends.

    Attributes:
        rank: of the product.
        seed: of the first guess.

    Raises:
        OptionError: a rank below 1.
    """

    rank: int = 1
    seed: int = 0

    def _first_state(self, factor: torch.Tensor) -> State:
        return {"step": 0, "factor": factor}

    def _factored(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return the factor whose turn it is."""
        matrix, is_left = _as_matrix(gradient), state["step"] % 2 == 0
        fixed = orthonormal(state["factor"])
        factor = matrix @ fixed if is_left else matrix.T @ fixed
        message = Message(factor.reshape(-1), gradient.shape, True, (fixed, is_left))
        return message, {"step": state["step"] + 1, "factor": factor}

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks; the average factor is the next one that stands."""
        message, state = self.compress(gradient, state)
        messages = yield message
        if state:
            average = messages[0].payload.view_as(state["factor"])
            state = {**state, "factor": average}
        return Reduced(self.combine(messages), state, self, message)

    def _add(self, message: Message, total: torch.Tensor) -> None:
        if message.context is None:
            total += message.payload
            return
        fixed, is_left = message.context
        factor = message.payload.view(-1, self.rank)
        left, right = (factor, fixed) if is_left else (fixed, factor)
        total.view(_matrix_shape(message.shape)).addmm_(left, right.T)


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Return orthonormal columns that span those of a matrix, also if some are zero."""
    columns: torch.Tensor = torch.linalg.qr(matrix).Q
    return columns


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, prod(shape[1:]) if len(shape) > 1 else prod(shape)


def _as_matrix(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.reshape(_matrix_shape(gradient.shape))
