"""Several optimizers that step one model, each its own parameters, say Muon matrices."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, MutableMapping, Sequence
from typing import Any

import torch

from packlight.errors import OptionError
from packlight.updates.update import ParameterUpdates, UpdateCost


class SeveralOptimizers(torch.optim.Optimizer):
    """Optimizers as one: their groups one after the other, their states together.

    Each stays the user's: nothing is copied, and each is stepped by its own `step()`.

    Args:
        optimizers: two or more, which share no parameter.

    Raises:
        OptionError: two of them hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        held: dict[int, int] = {}
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if held.setdefault(id(parameter), index) != index:
                        raise OptionError(
                            f"a parameter of shape {tuple(parameter.shape)} is in two optimizers: "
                            f"{type(self.optimizers[held[id(parameter)]]).__name__} and "
                            f"{type(optimizer).__name__}\nhint: fit a step for each of them, or "
                            "give every parameter to one"
                        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]
        """The states of all."""
        return _States(self.optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step one after the other."""
        for optimizer in self.optimizers:
            optimizer.step()


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers, each parameter's with the one that holds it."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._owner = {
            id(p): optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self._optimizers = optimizers

    def __getitem__(self, parameter: Any) -> Any:
        return self._owner[id(parameter)].state[parameter]

    def __setitem__(self, parameter: Any, state: Any) -> None:
        self._owner[id(parameter)].state[parameter] = state

    def __delitem__(self, parameter: Any) -> None:
        del self._owner[id(parameter)].state[parameter]

    def __contains__(self, parameter: object) -> bool:
        owner = self._owner.get(id(parameter))
        return owner is not None and parameter in owner.state

    def get(self, parameter: Any, default: Any = None) -> Any:
        """Return a parameter's state, without making one where it is missing."""
        return self[parameter] if parameter in self else default

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def parts_of(optimizer: torch.optim.Optimizer | None) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that one stands for."""
    if isinstance(optimizer, SeveralOptimizers):
        return optimizer.optimizers
    return () if optimizer is None else (optimizer,)


def states_left(optimizer: torch.optim.Optimizer | None, trained: Container[int]) -> dict[Any, Any]:
    """Return an optimizer's state of what is not trained: layers that were frozen later.

    Args:
        optimizer: the user's.
        trained: ids of the parameters that are.
    """
    return {
        parameter: state
        for part in parts_of(optimizer)
        for parameter, state in part.state.items()
        if id(parameter) not in trained
    }


class SeveralUpdates:
    """`ParameterUpdates` of several optimizers: each parameter goes to the one that holds it."""

    def __init__(self, optimizer: SeveralOptimizers) -> None:
        self.optimizer = optimizer
        self.parts = [ParameterUpdates(part) for part in optimizer.optimizers]

    @property
    def refusal(self) -> str | None:
        """Why parameters cannot be stepped one at a time, None if they can."""
        return next((part.refusal for part in self.parts if part.refusal is not None), None)

    def cost(
        self,
        parameter: torch.Tensor,
        gradient_stride: tuple[int, ...] | None = None,
        num_rows: int | None = None,
    ) -> UpdateCost:
        """Return what updating a parameter costs."""
        return self._of(parameter).cost(parameter, gradient_stride, num_rows)

    def cost_together(
        self, parameters: Sequence[torch.Tensor], strides: Sequence[tuple[int, ...]]
    ) -> UpdateCost:
        """Return what updating several parameters costs, with one step of each optimizer."""
        given = [*zip(parameters, strides, strict=True)]
        held = [[one for one in given if part.holds(one[0])] for part in self.parts]
        costs = [
            part.cost_together(*map(list, zip(*mine, strict=True)))
            for part, mine in zip(self.parts, held, strict=True) if mine
        ]
        return UpdateCost(
            sum(cost.state_bytes for cost in costs), max(cost.workspace_bytes for cost in costs),
            sum(cost.seconds for cost in costs), 1,
        )

    def is_sliced(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is updated slice by slice."""
        return self._of(parameter).is_sliced(parameter)

    def piece_unit(self, parameter: torch.Tensor) -> int | None:
        """Return where a parameter can be cut into pieces that are updated with the same bits."""
        return self._of(parameter).piece_unit(parameter)

    def keeps_form(self, parameter: torch.Tensor, num_rows: int) -> bool:
        """Whether a piece has the states that the whole has."""
        return self._of(parameter).keeps_form(parameter, num_rows)

    def kind(self, parameter: torch.Tensor) -> str:
        """Return what tells an update of a parameter from those of other optimizers."""
        return self._of(parameter).kind(parameter)

    def begin_step(self) -> None:
        """Say that a step starts."""
        self._each(ParameterUpdates.begin_step)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update a parameter."""
        self._of(parameter).apply(parameter, gradient)

    def apply_together(self, given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Update several parameters, those of each optimizer with one step."""
        for part in self.parts:
            mine = [(p, gradient) for p, gradient in given if part.holds(p)]
            if mine:
                part.apply_together(mine)

    def end_step(self) -> None:
        """Say that all parameters were updated."""
        self._each(ParameterUpdates.end_step)

    def _each(self, call: Callable[[ParameterUpdates], None]) -> None:
        for part in self.parts:
            call(part)

    def _of(self, parameter: torch.Tensor) -> ParameterUpdates:
        return next(part for part in self.parts if part.holds(parameter))


def updates_of(optimizer: torch.optim.Optimizer) -> ParameterUpdates | SeveralUpdates:
    """Return what steps one parameter at a time."""
    if isinstance(optimizer, SeveralOptimizers):
        return SeveralUpdates(optimizer)
    return ParameterUpdates(optimizer)
