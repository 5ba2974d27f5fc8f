"""Which parameters lie in pieces with all ranks, who has which rows, and what that costs.

A parameter is cut where its optimizer steps the pieces with the bits of the whole (observed on
copies), into pieces of as many rows; else it belongs to one rank as a whole, the one that has least
so far. Its gradient is added up for whoever has the rows, and so are its optimizer's states
theirs (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

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
        states: bytes of optimizer state that each rank has of them.
        gathered: those whose values lie in pieces; the others are whole on all ranks between their
            updates.
        keeps_gradients: gradients stay whole until they are used up.
    """

    pieces: Mapping[nn.Parameter, Pieces] = field(default_factory=dict)
    states: tuple[int, ...] = ()
    gathered: frozenset[nn.Parameter] = frozenset()
    keeps_gradients: bool = False

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return parameter in self.pieces

    def num_rows(self, parameter: nn.Parameter) -> int | None:
        """Return how many rows of a parameter the rank with most updates; None for all."""
        return self.pieces[parameter].most_rows if parameter in self else None

    def own_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Return the size of what the rank that has most has of some parameters' gradients."""
        parameters = list(parameters)
        whole = sum(p.nbytes for p in parameters if p not in self)
        mine = [(p.itemsize, self.pieces[p]) for p in parameters if p in self]
        num_ranks = max((len(pieces.rows) for _, pieces in mine), default=1)
        return whole + max(
            sum(itemsize * pieces.num_elements(rank) for itemsize, pieces in mine)
            for rank in range(num_ranks)
        )

    def with_values(self, gathered: Iterable[nn.Parameter]) -> Sharding:
        """Return the same with the values of some parameters in pieces, too."""
        return replace(self, gathered=frozenset(gathered))

    @property
    def rests(self) -> Mapping[nn.Parameter, Pieces]:
        """Those whose values lie in pieces, and who has which rows."""
        return {p: pieces for p, pieces in self.pieces.items() if p in self.gathered}

    @property
    def shared(self) -> list[nn.Parameter]:
        """The trained ones that are whole on all ranks, which share the rows that they update."""
        return [p for p in self.pieces if p not in self.gathered and p.requires_grad]

    @property
    def parameter_bytes(self) -> int:
        """Size of values in pieces, of the rank that has most."""
        return self._of_heaviest[0]

    @property
    def state_bytes(self) -> int:
        """Size of optimizer states of all of them, of that rank."""
        return self._of_heaviest[1]

    @cached_property
    def _of_heaviest(self) -> tuple[int, int]:
        weights = [
            (sum(p.itemsize * pieces.num_elements(rank) for p, pieces in self.rests.items()), state)
            for rank, state in enumerate(self.states)
        ]
        return max(weights, key=sum, default=(0, 0))


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
    return Sharding(pieces, tuple(states for _, states in weights), frozenset(pieces))


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
