"""Members of one shape as one module, whose parameters are theirs one behind the other.

The tree of modules is a member's, and each parameter in it has a dimension more, [members, ...]. A
call runs the member under `torch.func.vmap` over that dimension: N small operations are one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from packlight.capture.returned import loss_of
from packlight.errors import MemberError

MemberLoss = Callable[[nn.Module, Any], Any]
ChunkLoss = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]


class Stacked(nn.Module):
    """Some members of an ensemble, trained and asked together.

    Args:
        members: modules with equal names, shapes and dtypes; their values are copied.

    Raises:
        MemberError: two of them differ; names both shapes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        check_alike(members)
        self.num_members = len(members)
        self.tree = copy.deepcopy(members[0])
        if not self.is_alone:
            _stack(self.tree, members)

    @property
    def is_alone(self) -> bool:
        """Whether this is one member, which then is as it ever was: nothing is stacked."""
        return self.num_members == 1

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(member, *arguments)`, of a member put in place by `functional_call`."""
        return function(self.tree, *arguments)

    def each(
        self, function: Callable[..., Any], *arguments: Any, own_arguments: bool = False
    ) -> Any:
        """Return `function(member, *arguments)` of all members, [members, ...].

        Args:
            function: of a member and more.
            arguments: for all members, or with `own_arguments` for each: [members, ...].
            own_arguments: which of these.
        """
        if self.is_alone:
            own = _first(arguments) if own_arguments else arguments
            return pytree.tree_map_only(torch.Tensor, lambda t: t[None], self(function, *own))
        stacked = {f"tree.{name}": value for name, value in _named(self.tree).items()}

        def of_member(own: dict[str, torch.Tensor], *arguments: Any) -> Any:
            return functional_call(self, own, (function, *arguments))

        in_dims = (0, *(0 if own_arguments else None for _ in arguments))
        return vmap(of_member, in_dims=in_dims, randomness="different")(stacked, *arguments)

    def loss_function(self, loss_fn: MemberLoss, *, own_batches: bool) -> ChunkLoss:
        """Return what `packlight.fit` is given: the sum of the members' losses, and each of them.

        A member's gradient of the sum is that of its own loss.

        Args:
            loss_fn: `loss_fn(member, batch)` returns a scalar, or a tuple that begins with one.
            own_batches: whether tensors of the batch are [members, ...], each member's own.
        """

        def of_member(member: nn.Module, batch: Any) -> Any:
            return loss_of(loss_fn(member, batch))

        def of_chunk(chunk: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            losses = cast(Stacked, chunk).each(of_member, batch, own_arguments=own_batches)
            return losses.sum(), losses

        return of_chunk

    def member(self, index: int) -> nn.Module:
        """Return a copy of one member, as it is now."""
        member = copy.deepcopy(self.tree)
        if self.is_alone:
            return member
        _replace(member, lambda tensor: tensor.detach()[index].clone())
        return member


def _first(tensors: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[0], tensors)


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check_alike(members: Sequence[nn.Module]) -> None:
    """Check that members can be stacked.

    Raises:
        MemberError: there are none, or two differ.
    """
    if not members:
        raise MemberError("an ensemble without members")
    first = _described(members[0])
    for index, member in enumerate(members[1:], start=1):
        other = _described(member)
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                raise MemberError(
                    f"{name!r} is {_in_words(first.get(name))} in member 0 and "
                    f"{_in_words(other.get(name))} in member {index}",
                    name, (first.get(name), other.get(name)),
                )
        if type(member) is not type(members[0]):
            raise MemberError(
                f"member 0 is a {type(members[0]).__name__} and member {index} a "
                f"{type(member).__name__}"
            )


def _described(member: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in _named(member).items()
    }


def _in_words(described: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if described is None else f"{described[0]} {described[1]}"


def _stack(tree: nn.Module, members: Sequence[nn.Module]) -> None:
    """Give a copy of the first member all members' values."""
    of_all: dict[int, torch.Tensor] = {}
    named = [_named(member) for member in members]
    for name, tensor in _named(tree).items():
        values = [of_member[name] for of_member in named]
        of_all[id(tensor)] = torch.stack([value.detach() for value in values])
    _replace(tree, lambda tensor: of_all[id(tensor)])


def _replace(tree: nn.Module, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put other values in the place of each parameter and buffer; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in tree.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(new(parameter), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = new(buffer)
