"""Optimizers of members: each member's own, with settings of its own, on its rows of the stack.

Stepping a member's rows by the member's own optimizer gives its bits whatever the optimizer is.
Where all members have the same settings, and the optimizer is seen to compute the same bits on the
stack at once (as those do that work element by element), it steps the stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.costs.measure import same_bits
from packlight.errors import MemberError
from packlight.updates.twin import step_alone

NUM_OBSERVED_STEPS = 4
_OBSERVED_SHAPES = ((3, 5, 7), (3, 129), (3, 4, 3, 3, 3))

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Each:
    """A setting that each member has its own value of.

    Args:
        values: one for each member, in their order.
    """

    values: Sequence[Any]


class _Rule:
    """A member's optimizer without parameters and state: what its step computes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class MemberOptimizer(torch.optim.Optimizer):
    """Steps stacked parameters member by member.

    Args:
        parameters: of a `Stacked`, [members, ...].
        kind: of each member's optimizer, such as `torch.optim.AdamW`.
        settings: of each member's optimizer. They stand in `param_groups[0]["settings"]`, where a
            schedule may change them.

    The state is stacked, too: where a member's optimizer keeps a tensor, this keeps [members, ...].
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        kind: type[torch.optim.Optimizer],
        settings: Sequence[Settings],
    ) -> None:
        self._kind = kind
        self._rules = [_Rule(kind([nn.Parameter(torch.zeros(1))], **own)) for own in settings]
        super().__init__(parameters, {"settings": [dict(own) for own in settings]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step all members."""
        if closure is not None:
            raise MemberError("optimizers of members take no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["settings"])

    def _step(self, parameter: nn.Parameter, settings: Sequence[Settings]) -> None:
        stacked = self.state[parameter]
        is_first = not stacked
        # Of more rows than members (nobody has such parameters but who looks at what a step does)
        # each has the settings of some member.
        made: list[dict[str, torch.Tensor]] = []
        for row in range(parameter.shape[0]):
            index = row % len(settings)
            inner = self._rules[index].optimizer
            group = {**inner.param_groups[0], **settings[index]}
            member = parameter.detach()[row]
            own = {name: value[row] for name, value in stacked.items()}
            state = defaultdict(dict, {member: own})
            step_alone(inner, group, member, parameter.grad[row], state)  # type: ignore[index]
            if is_first:
                made.append(_checked(state[member], self._kind))
                continue
            for name, value in state[member].items():
                if value is not own.get(name):
                    stacked[name][row].copy_(value)
        if is_first and made[0]:
            for name in list(made[0]):
                stacked[name] = torch.stack([state.pop(name) for state in made])


def _checked(state: dict[str, Any], kind: type[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise MemberError(
                f"{kind.__name__} keeps a {type(value).__name__} as {name!r}, which cannot be "
                "stacked"
            )
    return state


def member_settings(settings: Settings, num_members: int) -> list[dict[str, Any]]:
    """Return each member's settings.

    Raises:
        MemberError: there is a value too few, or too many.
    """
    for name, value in settings.items():
        if isinstance(value, Each) and len(value.values) != num_members:
            raise MemberError(
                f"{name!r} has {len(value.values)} values for {num_members} members"
            )
    return [
        {n: v.values[index] if isinstance(v, Each) else v for n, v in settings.items()}
        for index in range(num_members)
    ]


def optimizer_of(
    parameters: Sequence[nn.Parameter],
    kind: type[torch.optim.Optimizer],
    settings: Sequence[Settings],
) -> torch.optim.Optimizer:
    """Return an optimizer that gives each member the bits of its own.

    Args:
        parameters: stacked, [members, ...].
        kind: of optimizer.
        settings: each member's.
    """
    if all(own == settings[0] for own in settings) and steps_stacks(kind, settings[0]):
        return kind(parameters, **settings[0])
    return MemberOptimizer(parameters, kind, settings)


def steps_stacks(kind: type[torch.optim.Optimizer], settings: Settings) -> bool:
    """Whether stepping a stack gives the bits of stepping its rows, seen on small made-up ones."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in _OBSERVED_SHAPES]
    whole = [nn.Parameter(value.clone()) for value in values]
    rows = [nn.Parameter(row.clone()) for value in values for row in value]
    together, alone = kind(whole, **settings), kind(rows, **settings)
    for _ in range(NUM_OBSERVED_STEPS):
        position = 0
        for parameter in whole:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for gradient in parameter.grad.clone():
                rows[position].grad = gradient
                position += 1
        together.step()
        alone.step()
    found = torch.cat([parameter.detach().flatten() for parameter in whole])
    expected = torch.cat([parameter.detach().flatten() for parameter in rows])
    return same_bits(found, expected)
