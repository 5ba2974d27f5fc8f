"""Models whose samples are cut over ranks: rows of images and volumes lie with several of them.

Activations are plain tensors, this rank's rows. Layers that look at several rows are replaced in
place (weights, names and hooks stay); what they need of other ranks' rows they get (Dryden et al.
2019, "Improving Strong-Scaling of CNN Training by Exploiting Finer-Grained Parallelism",
arXiv 1903.06681, there called sample-spatial parallelism). All else a model does must be the same
on some rows as on all, which is seen before anything runs (`watch`).

Each rank has a loss of its own, and gradients are the mean of all ranks', as with data parallel:
exchanges add up what the losses of all ranks say of a rank's rows. So losses of a rank's pixels and
losses of whole logits that all ranks have are both what they are on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, overload

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from packlight.convolution.axis import Axis, SplitLayer
from packlight.convolution.channels import PartModel, Parts
from packlight.convolution.dropout import SplitDropout
from packlight.convolution.layers import (
    SplitAveragePool,
    SplitConvolution,
    SplitMaxPool,
    SplitPadding,
    SplitPixelShuffle,
    SplitTransposed,
)
from packlight.convolution.normalization import SplitBatchNorm, SplitGroupNorm, SplitInstanceNorm
from packlight.convolution.parts import Channels, Filters, Style
from packlight.convolution.places import LayerPlace, SplitModel
from packlight.convolution.resampling import SplitAdaptiveAverage, SplitAdaptiveMax, SplitUpsample
from packlight.convolution.tracer import Call, Tracer
from packlight.convolution.watch import Cut
from packlight.errors import OptionError, RankMismatchError, UnsupportedModelError
from packlight.ranks.collectives import peers_of

# Spatial dimensions, and sizes of input and result along each axis.
Sizes = tuple[int, tuple[int, ...], tuple[int, ...]]

# What a layer becomes.
_SPLIT: dict[type[nn.Module], type[SplitLayer]] = {
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], SplitConvolution),
    **dict.fromkeys(
        [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d], SplitTransposed
    ),
    **dict.fromkeys([nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d], SplitMaxPool),
    **dict.fromkeys([nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d], SplitAveragePool),
    **dict.fromkeys(
        [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d], SplitAdaptiveAverage
    ),
    **dict.fromkeys(
        [nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d], SplitAdaptiveMax
    ),
    **dict.fromkeys(
        [nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d], SplitUpsample
    ),
    **dict.fromkeys(
        [
            *(getattr(nn, f"{kind}Pad{n}d")
              for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
              for n in (1, 2, 3)),
        ],
        SplitPadding,
    ),
    **dict.fromkeys(
        [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], SplitBatchNorm
    ),
    **dict.fromkeys(
        [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], SplitInstanceNorm
    ),
    **dict.fromkeys([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d], SplitDropout),
    nn.GroupNorm: SplitGroupNorm,
    nn.PixelShuffle: SplitPixelShuffle,
}


@dataclass(frozen=True)
class Spatial:
    """How samples are cut.

    Attributes:
        dims: the dimension of tensors (batch, channels, *spatial) that is cut along each dimension
            of the mesh, from 2; one number for a mesh of one dimension.
        far_halos: whether a layer may ask for rows of ranks that are no neighbours, where its halo
            is wider than what a neighbour has. By default that is refused.
    """

    dims: int | tuple[int, ...] = 2
    far_halos: bool = False


@overload
def parallelize_convolutions(
    model: nn.Module, mesh: DeviceMesh, plan: Spatial, example: Any
) -> SplitModel: ...


@overload
def parallelize_convolutions(
    model: nn.Module, mesh: DeviceMesh, plan: dict[str, Style], example: Any
) -> PartModel: ...


def parallelize_convolutions(
    model: nn.Module, mesh: DeviceMesh, plan: Spatial | dict[str, Style], example: Any
) -> SplitModel | PartModel:
    """Have a model work on a rank's rows of samples, or channels; before an optimizer is made.

    Args:
        model: changed in place: layers that look at several rows become layers of a subclass, with
            the same parameters, names and hooks.
        mesh: of the ranks, one dimension for each that is cut.
        plan: how samples are cut; or how layers with weights are split, by patterns of their paths
            (`Filters`, `Channels`): then parameters become this rank's parts.
        example: whole samples (their values do not matter: "meta" tensors do), or arguments of the
            model as a tuple; a list of these where samples have several sizes. The batch's size
            does not matter.

    Returns:
        The model, with a table of where everything lies.

    Raises:
        UnsupportedModelError: layers or calls that cannot be cut, with their paths; nothing was
            changed.
        OptionError: plan and mesh do not fit.
        RankMismatchError: ranks were given different models, plans or examples.
    """
    _compare(mesh, model, plan, example)
    if isinstance(plan, Spatial):
        axes = _axes_of(mesh, plan)
        splitter = _Splitter(model, axes)
        for one in example if isinstance(example, list) else [example]:
            splitter.see(one if isinstance(one, tuple) else (one,))
        return splitter.split()
    if isinstance(plan, dict) and all(isinstance(s, Filters | Channels) for s in plan.values()):
        return Parts(model, mesh, plan).split(example if isinstance(example, tuple) else (example,))
    raise OptionError(
        f"plan is {plan!r}\nhint: packlight.convolution.Spatial(...), or {{'path.*': Filters()}}"
    )


def _compare(mesh: DeviceMesh, model: nn.Module, plan: Any, example: Any) -> None:
    """Raise where a rank was asked for something else than the first one, on all of them."""
    leaves = pytree.tree_leaves(example)
    mine = [
        ("the plan", repr(plan)),
        ("the example", str([tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")])),
        *((f"layer {path!r}", f"{type(module).__name__}({module.extra_repr()})")
          for path, module in model.named_modules()),
    ]
    everybody = {dist.get_rank(): mine}
    for group in mesh.get_all_groups():  # along one dimension, then all of these along the next
        known: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(known, everybody, group)
        everybody = {rank: facts for some in known for rank, facts in some.items()}
    ranks = sorted(everybody)
    for rank in ranks[1:]:
        for one, another in zip_longest(
            everybody[ranks[0]], everybody[rank], fillvalue=("the number of layers", "fewer")
        ):
            if one != another:
                raise RankMismatchError(
                    one[0], ranks.index(rank), one[1], another[1], "every rank has to call "
                    "parallelize_convolutions with the same model, plan and example"
                )


def _axes_of(mesh: DeviceMesh, plan: Spatial) -> tuple[Axis, ...]:
    dims = plan.dims if isinstance(plan.dims, tuple) else (plan.dims,)
    if len(dims) != mesh.ndim or len({*dims}) != len(dims) or min(dims) < 2:
        raise OptionError(
            f"Spatial(dims={plan.dims}) on a mesh of {mesh.ndim} dimensions\nhint: a dimension of "
            "tensors (batch, channels, *spatial), from 2, for each of the mesh's"
        )
    names = mesh.mesh_dim_names or tuple(f"dimension {i}" for i in range(mesh.ndim))
    return tuple(
        Axis(dim, peers_of(mesh.get_group(i)), names[i], plan.far_halos)
        for i, dim in enumerate(dims)
    )


class _Splitter:
    """Sees on whole samples what each layer has to become, and makes it that."""

    def __init__(self, model: nn.Module, axes: tuple[Axis, ...]) -> None:
        self.model, self.axes = model, axes
        self.expected: Cut = tuple(axis.dim for axis in axes)
        self.whole: Cut = (None,) * len(axes)
        self.tracer = Tracer(model, _SPLIT, self.expected, self._after)
        self.sizes: dict[nn.Module, list[Sizes]] = {}
        self.seen_whole: dict[nn.Module, str] = {}
        self.places: list[LayerPlace] = []

    def _after(self, module: nn.Module, cut: Cut) -> Cut:
        is_whole = cut == self.whole or _SPLIT[type(module)].is_whole_after
        return self.whole if is_whole else self.expected

    def see(self, arguments: tuple[Any, ...]) -> None:
        """Look at what layers do for samples of one size."""
        self.tracer.trace(arguments)
        for call in self.tracer.calls:
            self._settle(call)
        self.tracer.calls.clear()

    def _settle(self, call: Call) -> None:
        place = call.path, call.kind, call.shape, call.out_shape
        if call.cut == self.whole:
            self.seen_whole[call.module] = call.path
            self.places.append(LayerPlace(*place, False, False))
            return
        if call.cut != self.expected:
            self.tracer.complain(
                f"{call.kind} of a tensor that is cut along {call.cut}, where (batch, channels, "
                f"*spatial) are cut along {self.expected}", call.module,
            )
            return
        sizes, out_sizes = (
            tuple(shape[axis.dim] for axis in self.axes) for shape in (call.shape, call.out_shape)
        )
        known = self.sizes.setdefault(call.module, [])
        if (len(call.shape) - 2, sizes, out_sizes) not in known:
            known.append((len(call.shape) - 2, sizes, out_sizes))
        key = tuple(a.num_rows(size) for a, size in zip(self.axes, sizes, strict=True))
        try:
            rows = _split(copy.copy(call.module), self.axes, call.path, known).known[key]
        except UnsupportedModelError as error:
            self.tracer.complain(f"{call.kind}: {error}", call.module)
            return
        is_cut_after = not _SPLIT[type(call.module)].is_whole_after
        self.places.append(LayerPlace(*place, True, is_cut_after, rows))

    def split(self) -> SplitModel:
        """Replace layers.

        Raises:
            UnsupportedModelError: some cannot be.
        """
        for module in self.seen_whole.keys() & self.sizes.keys():
            self.tracer.complain("is called with tensors that are cut and with whole ones", module)
        self.tracer.refuse(
            "layers of torch.nn in the place of functions know their rows (nn.Upsample, "
            "nn.MaxPool2d, nn.AdaptiveAvgPool2d(1) before a classifier)"
        )
        for module, known in self.sizes.items():
            _split(module, self.axes, self.tracer.path_of[module], known).keep_numbers()
        return SplitModel(self.model, self.axes, tuple(self.places), self.tracer.is_cut_after)


def _split(
    module: nn.Module, axes: tuple[Axis, ...], path: str,
    known: Sequence[Sizes],
) -> SplitLayer:
    """Make a layer one that knows its rows, in place."""
    module.__class__ = _class_of(type(module))
    assert isinstance(module, SplitLayer)
    module.axes, module.path, module.known, module.numbers = axes, path, {}, {}
    for num_dims, sizes, out_sizes in known:
        module.num_dims = num_dims
        module.check()
        module.learn(sizes, out_sizes)
    return module


_classes: dict[type[nn.Module], type[SplitLayer]] = {}


def _class_of(kind: type[nn.Module]) -> type[SplitLayer]:
    """Return the class of a layer that knows its rows."""
    if kind not in _classes:
        _classes[kind] = type(f"Split{kind.__name__}", (_SPLIT[kind], kind), {})
    return _classes[kind]
