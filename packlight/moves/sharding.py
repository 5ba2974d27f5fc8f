"""Which parameters lie in pieces with all ranks, who has which rows, and what that costs.

A parameter is cut where its optimizer steps the pieces with the bits of the whole (observed on
copies), into pieces of as many rows; else it belongs to one rank as a whole, the one that has least
so far. Its gradient is added up for whoever has the rows, and so are its optimizer's states
theirs (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from packlight.capture.step_capture import CapturedLoss
from packlight.moves.stream.parameters import parameter_slots, without_results
from packlight.ranks.pieces import Pieces
from packlight.torch_internals.autograd import has_gradient_hooks
from packlight.updates.several import SeveralUpdates
from packlight.updates.update import ParameterUpdates, UpdateCost

Updates = ParameterUpdates | SeveralUpdates


@dataclass(frozen=True)
class Sharding:
    """The parameters of a model that lie in pieces.

    Attributes:
        pieces: who has which rows.
        parameter_bytes, state_bytes: of the rank that has most.
    """

    pieces: Mapping[nn.Parameter, Pieces] = field(default_factory=dict)
    parameter_bytes: int = 0
    state_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return parameter in self.pieces

    @property
    def whole_bytes(self) -> int:
        """Size of all of them, whole."""
        return sum(parameter.nbytes for parameter in self.pieces)


def shardable(
    model: nn.Module, loss: CapturedLoss, trained: Container[int]
) -> list[nn.Parameter]:
    """Return the parameters that can lie in pieces with all ranks, in the model's order.

    Left out are small ones, those that share their memory, and those with hooks, which look at
    whole gradients.

    Args:
        model: with whole parameters.
        loss: as captured.
        trained: ids of those that are updated; frozen ones are gathered, too.
    """
    slots = without_results(parameter_slots(model), loss)
    return [
        p for p in model.parameters()
        if p in slots and p.ndim > 0 and not has_gradient_hooks(p)
        and (id(p) in trained or not p.requires_grad)
    ]


def cut(parameters: Iterable[nn.Parameter], updates: Updates | None, num_ranks: int) -> Sharding:
    """Return parameters in pieces that weigh about the same on all ranks.

    Args:
        parameters: in the model's order; frozen ones among them have no state.
        updates: of the optimizer.
        num_ranks: how many have a piece each.
    """
    weights = [[0, 0] for _ in range(num_ranks)]  # bytes of values and of states, of each rank
    pieces: dict[nn.Parameter, Pieces] = {}
    undivided: list[nn.Parameter] = []
    for parameter in parameters:
        even = _even(parameter, updates, num_ranks)
        if even is None:
            undivided.append(parameter)
            continue
        pieces[parameter] = even
        for rank, weight in enumerate(weights):
            _add(weight, parameter, updates, even.num_rows(rank))
    for parameter in sorted(undivided, key=lambda p: -p.nbytes):  # (the order of equals stays)
        owner = min(range(num_ranks), key=lambda rank: sum(weights[rank]))
        pieces[parameter] = Pieces.of_owner(tuple(parameter.shape), num_ranks, owner)
        _add(weights[owner], parameter, updates, parameter.shape[0])
    values, states = max(weights, key=sum)
    return Sharding(pieces, values, states)


def _even(parameter: nn.Parameter, updates: Updates | None, num_ranks: int) -> Pieces | None:
    shape = tuple(parameter.shape)
    if not parameter.requires_grad:
        return Pieces.even(shape, num_ranks)
    assert updates is not None, "what is trained has an optimizer"
    unit = updates.piece_unit(parameter)
    if unit is None:
        return None
    even = Pieces.even(shape, num_ranks, unit)
    is_alike = all(updates.keeps_form(parameter, rows) for rows in even.sizes)
    return even if is_alike else None


def _add(weight: list[int], parameter: nn.Parameter, updates: Updates | None, rows: int) -> None:
    weight[0] += parameter.nbytes // parameter.shape[0] * rows
    if rows and parameter.requires_grad:
        assert updates is not None
        weight[1] += piece_cost(parameter, updates, rows).state_bytes


def piece_cost(parameter: nn.Parameter, updates: Updates, rows: int) -> UpdateCost:
    """Return what updating a piece costs, and its state."""
    return updates.cost(parameter, None, rows)
