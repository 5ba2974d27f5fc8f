"""Which tensors of a model are compressed, and how parametrizations stand in for them meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from packlight.compress.errors import CompressionError


@dataclass(frozen=True)
class Place:
    """A parameter of a model.

    Attributes:
        name: in `state_dict()`.
        module: that holds it.
        leaf: its name there.
        order: of the module's parameters as it was found.
    """

    name: str
    module: nn.Module
    leaf: str
    order: tuple[str, ...]

    @property
    def tensor(self) -> torch.Tensor:
        """What the layer computes with now."""
        tensor: torch.Tensor = getattr(self.module, self.leaf)
        return tensor

    @property
    def stored(self) -> nn.Parameter:
        """The parameter behind it, which an optimizer trains."""
        if parametrize.is_parametrized(self.module, self.leaf):
            return self.module.parametrizations[self.leaf].original  # type: ignore
        return self.tensor  # type: ignore[return-value]


def places_of(model: nn.Module, names: Iterable[str] | None = None) -> list[Place]:
    """Return the parameters that are to be compressed, in the order of the model.

    Args:
        model: any.
        names: of parameters; None is all those of two dims and more: weights of linear layers,
            convolutions and embeddings. Parameters that several modules share are taken once.

    Raises:
        CompressionError: there is no such parameter, it is parametrized already, or not finite.
    """
    found: dict[str, Place] = {}
    taken: set[int] = set()
    wanted = None if names is None else set(names)
    for prefix, module in model.named_modules():
        if prefix.endswith("parametrizations") or ".parametrizations." in f".{prefix}.":
            continue
        leaves = dict(module.named_parameters(recurse=False))
        leaves.update(getattr(module, "parametrizations", {}))
        for leaf in leaves:
            name = f"{prefix}.{leaf}" if prefix else leaf
            place = Place(name, module, leaf, tuple(leaves))
            if id(place.stored) in taken:
                continue
            if place.stored.dim() > 1 if wanted is None else name in wanted:
                taken.add(id(place.stored))
                found[name] = place
    for name in sorted((wanted or set()) - set(found)):
        known = ", ".join(list(dict(model.named_parameters()))[:8])
        raise CompressionError(name, "is no parameter of the model", f"there are {known}")
    for place in found.values():
        if parametrize.is_parametrized(place.module, place.leaf):
            raise CompressionError(
                place.name, "is parametrized already", "call finish() of what did so first"
            )
        if not torch.isfinite(place.tensor).all():
            raise CompressionError(
                place.name, "has weights that are NaN or infinite", "train from a sound checkpoint"
            )
    if not found:
        raise CompressionError(
            type(model).__name__, "has no weights of two dims or more", "name some: names=[...]"
        )
    return list(found.values())


def attach(place: Place, form: nn.Module) -> None:
    """Let a layer compute with what `form` makes of its parameter."""
    parametrize.register_parametrization(place.module, place.leaf, form, unsafe=True)


def detach(place: Place) -> None:
    """Make what the layer computes with its plain parameter again, where it was among others.

    The order matters to who pairs parameters with an optimizer's saved state.
    """
    parametrize.remove_parametrizations(place.module, place.leaf, leave_parametrized=True)
    held = place.module._parameters
    for leaf in place.order:
        if leaf in held:
            held[leaf] = held.pop(leaf)
