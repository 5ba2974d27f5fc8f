"""Models whose weights lie in parts with all ranks (tensor parallel), as models of local tensors.

`torch.distributed.tensor.parallel.parallelize_module` makes DTensors of a model's parameters, and
has modules exchange what they need (Shoeybi et al. 2019, arXiv 1909.08053). `localize` makes each
of them a parameter that is this rank's part, which the module reads as the DTensor that it was. So
an optimizer steps parts, and a traced loss has local tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from packlight.errors import UnsupportedModelError


class AsDTensor(nn.Module):
    """Has this rank's part of a parameter be the DTensor that it is a part of.

    Args:
        whole: the DTensor.
        num_blocks: how many matrices lie beside one another in it (queries, keys and values), each
            of which is cut: the DTensor has each rank's parts of all of them together.
    """

    def __init__(self, whole: Any, num_blocks: int = 1) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.mesh, self.placements = whole.device_mesh, whole.placements
        self.whole_shape, self.whole_stride = whole.shape, whole.stride()

    def forward(self, part: torch.Tensor) -> Any:
        """Return the DTensor."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.whole_shape,
            stride=self.whole_stride,
        )

    @property
    def part(self) -> Part | None:
        """Where this rank's lies; None where all ranks have all of it."""
        (placement,) = self.placements
        if placement.is_replicate():
            return None
        dim, num_blocks = placement.dim % len(self.whole_shape), self.num_blocks
        each = self.whole_shape[dim] // num_blocks
        size = each // self.mesh.size()
        first = self.mesh.get_local_rank() * size
        blocks = tuple((block * each + first, size) for block in range(num_blocks))
        return Part(tuple(self.whole_shape), dim, blocks)


def localize(model: nn.Module) -> nn.Module:
    """Make parameters that are DTensors parameters that are this rank's parts; before an optimizer.

    A parameter `name` of a module becomes `parametrizations.name.original`; the module reads it as
    before.

    Args:
        model: as `parallelize_module` left it; changed in place.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: ranks have parts of different sizes, or a sum is left to be made.
    """
    return localized(model, {})


def localized(model: nn.Module, num_blocks: Mapping[str, int]) -> nn.Module:
    """Do that where some parameters have several matrices beside one another.

    Args:
        model: changed in place.
        num_blocks: how many, by the parameter's name; 1 for others.
    """
    from torch.distributed.tensor import DTensor

    made: dict[int, nn.Parameter] = {}
    for path, module in [*model.named_modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not isinstance(parameter, DTensor):
                continue
            full_name = f"{path}.{name}".lstrip(".")
            _refuse_uneven(full_name, parameter)
            if id(parameter) in made:
                raise UnsupportedModelError(
                    f"parameter {full_name!r} is another one, too: tied weights cannot be "
                    "split over ranks yet\nhint: leave them whole"
                )
            part = nn.Parameter(
                parameter.to_local().detach().clone(), requires_grad=parameter.requires_grad
            )
            made[id(parameter)] = part
            setattr(module, name, part)
            whole = AsDTensor(parameter, num_blocks.get(full_name, 1))
            parametrize.register_parametrization(module, name, whole, unsafe=True)
    return model


def _refuse_uneven(name: str, parameter: Any) -> None:
    if parameter.device_mesh.ndim > 1:
        raise UnsupportedModelError(
            f"parameter {name!r} lies on a mesh of {parameter.device_mesh.ndim} dimensions\n"
            "hint: parallelize_module(model, mesh['tensor'], ...); what ranks along the others "
            "share is planned by fit"
        )
    for dim, placement in enumerate(parameter.placements):
        size = parameter.device_mesh.size(dim)
        if placement.is_partial():
            raise UnsupportedModelError(f"parameter {name!r} is a sum that is not made yet")
        if placement.is_shard() and parameter.shape[placement.dim] % size:
            raise UnsupportedModelError(
                f"parameter {name!r} of shape {tuple(parameter.shape)} has no equal parts for "
                f"{size} ranks\nhint: ranks run one plan, so they need parts of one size"
            )


@dataclass(frozen=True)
class Part:
    """Where a rank's part of a parameter lies in the whole one.

    Attributes:
        shape: of the whole.
        dim: along which it is cut.
        blocks: of the whole along that dimension, in the order in which the part has them: where
            each begins, and its size.
    """

    shape: tuple[int, ...]
    dim: int
    blocks: tuple[tuple[int, int], ...]


def parts_of(model: nn.Module) -> dict[nn.Parameter, Part | None]:
    """Return a model's parameters whose values differ between ranks, and where they lie.

    Layers that are parts themselves (`packlight.convolution`) say so, and know alone where: None.
    """
    found: dict[nn.Parameter, Part | None] = {
        parameter: made.part
        for _, parameter, made in _localized(model)
        if made.part is not None
    }
    of_layers = (p for m in model.modules() for p in getattr(m, "packlight_parts", ()))
    return dict.fromkeys(of_layers) | found


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return what a localized model's parameters are called in the model that was split."""
    return {
        f"{path}parametrizations.{name}.original": f"{path}{name}"
        for (path, name), _, _ in _localized(model)
    }


def _localized(
    model: nn.Module,
) -> Iterator[tuple[tuple[str, str], nn.Parameter, AsDTensor]]:
    """Yield the path of its module and the name, the parameter, and what it is a part of."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, steps in module.parametrizations.items():
            if isinstance(steps, parametrize.ParametrizationList) and len(steps) == 1:
                (made,) = steps
                if isinstance(made, AsDTensor):
                    parameter = steps.original
                    assert isinstance(parameter, nn.Parameter)
                    yield (f"{path}." if path else "", name), parameter, made
