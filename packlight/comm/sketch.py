"""A few numbers of which the largest elements can be told: Sketched SGD (Ivkin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import torch

from packlight.comm.compressor import Compressor, Message, Reduced, Reduction, State
from packlight.comm.packing import Indices, kernels
from packlight.comm.sparse import check_density, largest
from packlight.errors import OptionError


@dataclass(frozen=True)
class CountSketch(Compressor):
    """The largest elements of the *average* gradient, which no rank knows.

    Every rank adds each element to a random cell of each row of a table, with a random sign. Tables
    are summed on the way; the median over the rows estimates an element of the sum. In a second
    round the ranks send the exact values of the elements whose estimates are largest (the paper's
    algorithm 1; all that is sent is used, where the paper keeps the largest part). A gradient that
    is no larger than its table is sent as it is. `compress` alone sends the table.

    Attributes:
        density: share of elements whose values are sent.
        rows: of the table; more make a false estimate less likely.
        cells: of a row, as a share of the elements.
        seed: of cells and signs.

    Raises:
        OptionError: a number that it does not take.
    """

    density: float = 0.01
    rows: int = 5
    cells: float = 0.01
    seed: int = 0
    is_contraction = True

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.rows, int) or self.rows < 1:
            raise OptionError(f"rows={self.rows!r}; it must be a whole number, 1 or larger")
        if not 0 < self.cells <= 1:
            raise OptionError(f"cells={self.cells!r}; a share of the elements, above 0, at most 1")

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return a key, the same on all ranks."""
        return {"key": (self.seed * 1_000_003 + number) % 2**32}

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return the table of a gradient."""
        num_cells = self._num_cells(gradient.numel())
        if num_cells is None:
            return Message(gradient.reshape(-1), gradient.shape, is_linear=True), state
        table = np.zeros((self.rows, num_cells), np.float32)
        kernels().add_to_sketch(gradient.reshape(-1).numpy(), state["key"], table)
        payload = torch.from_numpy(table.ravel())
        return Message(payload, gradient.shape, True, state["key"]), state

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks: tables first, then the elements that they point at."""
        message, state = self.compress(gradient, state)
        messages = yield message
        if message.context is not None:
            indices = self._largest(messages[0])[0]
            chosen = gradient.reshape(-1)[torch.from_numpy(indices)]
            message = Message(chosen, gradient.shape, is_linear=True, context=indices)
            messages = yield message
        return Reduced(self.combine(messages), state, self, message)

    def _add(self, message: Message, total: torch.Tensor) -> None:
        if message.context is None:
            total += message.payload
        elif isinstance(message.context, np.ndarray):
            total[torch.from_numpy(message.context)] += message.payload
        else:
            indices, estimates = self._largest(message)
            total[torch.from_numpy(indices)] += estimates

    def _largest(self, message: Message) -> tuple[Indices, torch.Tensor]:
        """Return the indices of the largest estimates, ascending, and these."""
        estimates = np.empty(prod(message.shape), np.float32)
        table = message.payload.numpy().reshape(self.rows, -1)
        kernels().estimate_from_sketch(table, message.context, estimates)
        indices = largest(estimates, ceil(self.density * len(estimates)))
        return indices, torch.from_numpy(estimates[indices])

    def _num_cells(self, num_elements: int) -> int | None:
        """Return how many cells a row has; None where the table would be no smaller."""
        num_cells = ceil(self.cells * num_elements)
        return num_cells if self.rows * num_cells < num_elements else None
