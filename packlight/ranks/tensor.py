"""Models whose weights lie in parts with all ranks (tensor parallel), as models of local tensors.

`torch.distributed.tensor.parallel.parallelize_module` makes DTensors of a model's parameters, and
has modules exchange what they need (Shoeybi et al. 2019, arXiv 1909.08053). `localize` makes each
of them a parameter that is this rank's part, which the module reads as the DTensor that it was. So
an optimizer steps parts, and a traced loss has local tensors alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from packlight.errors import UnsupportedModelError


class AsDTensor(nn.Module):
    """Has this rank's part of a parameter be the DTensor that it is a part of.

    Args:
        whole: the DTensor.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__()
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
    def is_same_on_all(self) -> bool:
        """Whether all ranks have all of it."""
        return all(placement.is_replicate() for placement in self.placements)


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
    from torch.distributed.tensor import DTensor

    made: dict[int, nn.Parameter] = {}
    for path, module in [*model.named_modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not isinstance(parameter, DTensor):
                continue
            _refuse_uneven(f"{path}.{name}".lstrip("."), parameter)
            if id(parameter) in made:
                raise UnsupportedModelError(
                    f"parameter {f'{path}.{name}'!r} is another one, too: tied weights cannot be "
                    "split over ranks yet\nhint: leave them whole"
                )
            part = nn.Parameter(
                parameter.to_local().detach().clone(), requires_grad=parameter.requires_grad
            )
            made[id(parameter)] = part
            setattr(module, name, part)
            parametrize.register_parametrization(module, name, AsDTensor(parameter), unsafe=True)
    return model


def _refuse_uneven(name: str, parameter: Any) -> None:
    for dim, placement in enumerate(parameter.placements):
        size = parameter.device_mesh.size(dim)
        if placement.is_partial():
            raise UnsupportedModelError(f"parameter {name!r} is a sum that is not made yet")
        if placement.is_shard() and parameter.shape[placement.dim] % size:
            raise UnsupportedModelError(
                f"parameter {name!r} of shape {tuple(parameter.shape)} has no equal parts for "
                f"{size} ranks\nhint: ranks run one plan, so they need parts of one size"
            )


def parts_of_ranks(model: nn.Module) -> set[int]:
    """Return the ids of a model's parameters whose values differ between ranks."""
    of_dtensors = {
        id(made.original)
        for made in model.modules()
        if isinstance(made, parametrize.ParametrizationList)
        and any(isinstance(step, AsDTensor) and not step.is_same_on_all for step in made)
    }
    # Layers that are parts themselves say so (`packlight.convolution`).
    of_layers = {id(p) for m in model.modules() for p in getattr(m, "packlight_parts", ())}
    return of_dtensors | of_layers
