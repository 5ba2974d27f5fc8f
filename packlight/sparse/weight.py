"""A weight of which only nonzeros are stored, as a module: values, and an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from packlight.sparse import pattern


class SparseWeight(nn.Module):
    """Values and the index of where they are, for one layer, or for several that share it.

    Attributes:
        values: the parameter, a vector; in the order of positions. Optimizers see nothing else.
        index: uint8, see `packlight.sparse.pattern`.
        shape: of the weight, as if it were dense.
        name: in the model, for messages.

    Args:
        values: float32, bfloat16 or float16.
        positions: of the values in the flattened weight, int64, ascending.
        shape: of the weight.
    """

    values: nn.Parameter
    index: torch.Tensor

    def __init__(
        self, values: torch.Tensor, positions: torch.Tensor, shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.name = "weight"
        self.values = nn.Parameter(values)
        self.register_buffer("index", pattern.encode(positions, shape))
        self._per_value: list[str] = []

    @classmethod
    def of_dense(cls, weight: torch.Tensor, positions: torch.Tensor) -> SparseWeight:
        """Return the elements of a dense weight at some positions."""
        with torch.no_grad():
            values = weight.reshape(-1)[positions]
        result = cls(values, positions, weight.shape)
        result.values.requires_grad_(weight.requires_grad)
        return result

    def numel(self) -> int:
        """Return how many elements the weight has, zeros included."""
        return prod(self.shape)

    @property
    def num_nonzeros(self) -> int:
        """How many elements are stored, zero or not."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    def positions(self) -> torch.Tensor:
        """Return where the values are in the flattened weight, ascending (int64)."""
        return pattern.decode(self.index, self.shape)

    def dense(self) -> torch.Tensor:
        """Return the weight with its zeros, detached."""
        out = torch.zeros(self.numel(), dtype=self.dtype, device=self.device)
        return out.index_copy_(0, self.positions(), self.values.detach()).view(self.shape)

    def add_per_value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a number for each value, which moves with it where the pattern changes."""
        self.register_buffer(name, tensor)
        self._per_value.append(name)

    def per_value(self) -> dict[str, torch.Tensor]:
        """Return what was added so, by name."""
        return {name: getattr(self, name) for name in self._per_value}

    @torch.no_grad()
    def rearrange(self, source: torch.Tensor, positions: torch.Tensor) -> None:
        """Take another pattern; what is stored keeps its place in memory where its size stays.

        Args:
            source: for each new value which old one it is, -1 for a zero.
            positions: of the new values, ascending.
        """
        index = pattern.encode(positions, self.shape)
        is_resized = len(index) != len(self.index)
        for name, old in [("values", self.values), *self.per_value().items()]:
            new = rearranged(old.detach(), source)
            if name == "values" and is_resized:
                self._resize(new)
            elif is_resized:
                setattr(self, name, new)
            else:
                old.copy_(new)
        if is_resized:
            self.index = index
        else:
            self.index.copy_(index)
        self.values.grad = None

    def _resize(self, values: torch.Tensor) -> None:
        """Take other values into the same parameter, which optimizers know."""
        self.values.grad = None
        # While any old graph lives (a loss that a loop still holds), autograd goes on to use the
        # parameter's accumulator, with its old size; only another dtype makes it let go of it.
        other = torch.float64 if values.dtype != torch.float64 else torch.float32
        self.values.data = torch.empty(0, dtype=other)
        self.values.data = values

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the saved pattern, which may have more or fewer nonzeros."""
        values, index = (state_dict.get(prefix + name) for name in ("values", "index"))
        if isinstance(values, torch.Tensor) and isinstance(index, torch.Tensor):
            pattern.check_pattern(prefix.rstrip("."), values, index, self.shape)
            if len(values) != self.num_nonzeros:
                self._resize(self.values.detach().new_empty(len(values)))
                self.index = torch.empty_like(index, device=self.device)
                for name, old in self.per_value().items():
                    setattr(self, name, old.new_empty(len(values)))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Return the shape, and how much of it is stored."""
        share = self.num_nonzeros / self.numel()
        return f"shape={tuple(self.shape)}, {self.num_nonzeros} nonzeros ({share:.2%})"


def rearranged(old: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the elements of a vector that `source` names, zero where it is -1."""
    return old[source.clamp(min=0)].masked_fill_(source < 0, 0)
