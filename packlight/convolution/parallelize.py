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
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from packlight.convolution.axis import Axis, Rows, SplitLayer
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
from packlight.convolution.resampling import SplitAdaptiveAverage, SplitAdaptiveMax, SplitUpsample
from packlight.convolution.watch import Cut, Watch
from packlight.errors import OptionError, UnsupportedModelError
from packlight.ranks.collectives import peers_of
from packlight.torch_internals.dispatch import FakeTensorMode

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


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer's input, result and weights lie.

    Attributes:
        path: of the layer.
        kind: its class, as it was.
        shape: of its input, all ranks together.
        out_shape: of its result.
        is_cut: whether the input is cut.
        is_cut_after: whether the result is.
        rows: what it does along each axis; none where the input is whole.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    is_cut: bool
    is_cut_after: bool
    rows: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class SplitModel:
    """A model on this rank's rows.

    Attributes:
        model: it, changed in place.
        axes: the dimensions that are cut.
        layers: where everything lies, for each example, in the order in which layers run.
        is_cut_after: whether the model's results are this rank's rows, too.
    """

    model: nn.Module
    axes: tuple[Axis, ...]
    layers: tuple[LayerPlace, ...]
    is_cut_after: bool

    def part(self, whole: torch.Tensor, channels: bool = True) -> torch.Tensor:
        """Return this rank's rows of samples.

        Args:
            whole: (batch, channels, *spatial), or labels (batch, *spatial).
            channels: whether there are channels.
        """
        for axis in self.axes:
            dim = axis.dim if channels else axis.dim - 1
            start, end = axis.bounds(whole.shape[dim])
            whole = whole.narrow(dim, start, end - start)
        return whole.clone(memory_format=torch.contiguous_format)

    def weight(self, *sizes: int) -> float:
        """Return by what to multiply a mean over this rank's rows; 1 where all have as many.

        The mean over ranks is then that of all rows.

        Args:
            sizes: of the dimensions that are cut, on all ranks together.
        """
        share = 1.0
        for axis, size in zip(self.axes, sizes, strict=True):
            share *= axis.num_rows(size) * axis.peers.size / size
        return share

    def describe(self) -> str:
        """Return a table of where each layer's input, result and weights lie."""
        names = " x ".join(f"{axis.name}={axis.peers.size}" for axis in self.axes)
        lines = [f"dimensions {', '.join(str(a.dim) for a in self.axes)} over {names}"]
        width = max([len(layer.path) for layer in self.layers], default=0)
        for layer in self.layers:
            rows = [
                f"{axis.dim}: {_words(each, axis)}"
                for axis, each in zip(self.axes, layer.rows, strict=False)
            ]
            lines.append(
                f"{layer.path:<{width}}  {layer.kind:<18} {_shape(layer.shape, layer.is_cut)} -> "
                f"{_shape(layer.out_shape, layer.is_cut_after)}  {'; '.join(rows)}".rstrip()
            )
        lines.append("weights are whole on all ranks; their gradients are the mean of all ranks'")
        return "\n".join(lines)

    def halo_rows(self) -> list[tuple[str, int, int]]:
        """Return what this rank gets: (path, dimension, rows), where any come from others."""
        return [
            (layer.path, axis.dim, each.map.num_received(axis.peers.rank))
            for layer in self.layers
            for axis, each in zip(self.axes, layer.rows, strict=False)
            if each.map.most_received
        ]


def _shape(shape: Sequence[int], is_cut: bool) -> str:
    return f"({', '.join(map(str, shape[1:]))}) {'cut' if is_cut else 'whole'}"


def _words(rows: Rows, axis: Axis) -> str:
    count = rows.map.most_received
    return f"{count} rows from others" if count else "own rows"


def parallelize_convolutions(
    model: nn.Module, mesh: DeviceMesh, plan: Spatial, example: Any
) -> SplitModel:
    """Have a model work on this rank's rows of samples; before an optimizer is made.

    Args:
        model: changed in place: layers that look at several rows become layers of a subclass, with
            the same parameters, names and hooks.
        mesh: of the ranks, one dimension for each that is cut.
        plan: how samples are cut.
        example: whole samples (their values do not matter: "meta" tensors do), or arguments of the
            model as a tuple; a list of these where samples have several sizes. The batch's size
            does not matter.

    Returns:
        The model, with a table of where everything lies.

    Raises:
        UnsupportedModelError: layers or calls that cannot be cut, with their paths; nothing was
            changed.
        OptionError: plan and mesh do not fit.
    """
    if isinstance(plan, Spatial):
        axes = _axes_of(mesh, plan)
        tracer = _Tracer(model, axes)
        for one in example if isinstance(example, list) else [example]:
            tracer.trace(one if isinstance(one, tuple) else (one,))
        return tracer.split()
    raise OptionError(f"plan is a {type(plan).__name__}\nhint: packlight.convolution.Spatial(...)")


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


class _Tracer:
    """Runs a model on whole samples without memory, and sees what each layer has to become."""

    def __init__(self, model: nn.Module, axes: tuple[Axis, ...]) -> None:
        self.model, self.axes = model, axes
        self.problems: dict[str, None] = {}
        self.calls: dict[nn.Module, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}
        self.seen_whole: set[nn.Module] = set()
        self.places: list[LayerPlace] = []
        self.path_of = {module: path for path, module in model.named_modules()}
        self.is_cut_after = False
        self._running: list[nn.Module] = []
        self._training: set[nn.Module] = set()
        self._seen: list[tuple[nn.Module, Cut, tuple[int, ...], tuple[int, ...]]] = []
        self._expected: Cut = tuple(axis.dim for axis in axes)
        self._watch = Watch(len(axes), self._complain)

    def _complain(self, words: str, module: nn.Module | None = None) -> None:
        module = module or (self._running[-1] if self._running else self.model)
        self.problems[f"{self.path_of[module] or 'the model itself'}: {words}"] = None

    def trace(self, arguments: tuple[Any, ...]) -> None:
        """Run the model once."""
        handles = []
        for module in self.path_of:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(
                self._leave, with_kwargs=True, always_call=True
            ))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), self._watch:
                self._watch.is_inside = True
                device = next(self.model.parameters(), torch.empty(0)).device
                made = pytree.tree_map_only(
                    torch.Tensor,
                    lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), arguments,
                )
                self._watch.is_inside = False
                for tensor in pytree.tree_leaves(made):
                    if isinstance(tensor, torch.Tensor) and tensor.ndim > max(
                        axis.dim for axis in self.axes
                    ):
                        self._watch.note(tensor, self._expected)
                results = pytree.tree_leaves(self.model(*made))
                self.is_cut_after = any(
                    self._watch.is_cut(t) for t in results if isinstance(t, torch.Tensor)
                )
        finally:
            for handle in handles:
                handle.remove()
        for call in self._seen:
            self._settle(*call)
        self._seen.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(module)
        if type(module) in _SPLIT:
            self._watch.is_inside = True
            if module.training:  # sizes are the same, and nothing is counted or followed
                self._training.add(module)
                module.training = False

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        if module in self._training:
            self._training.remove(module)
            module.training = True
        if type(module) not in _SPLIT or any(type(m) in _SPLIT for m in self._running):
            return
        self._watch.is_inside = False
        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        given = [*args, *kwargs.values()]
        if not outputs or not given:
            return  # it raised
        x, cut = given[0], self._watch.cut_of(given[0])
        self._seen.append((module, cut, tuple(x.shape), tuple(outputs[0].shape)))
        if cut == self._watch.whole:
            return
        if len(given) > 1 or kwargs:
            self._complain(f"{type(module).__name__} with arguments beside its input", module)
        if not _SPLIT[type(module)].is_whole_after:
            for each in outputs:
                self._watch.note(each, self._expected)

    def _settle(
        self, module: nn.Module, cut: Cut, shape: tuple[int, ...], out_shape: tuple[int, ...]
    ) -> None:
        """See what a layer does that was called."""
        path, name = self.path_of[module], type(module).__name__
        if cut == self._watch.whole:
            self.seen_whole.add(module)
            self.places.append(LayerPlace(path, name, shape, out_shape, False, False))
            return
        if cut != self._expected:
            self._complain(
                f"{name} of a tensor that is cut along {cut}, where (batch, channels, *spatial) "
                f"are cut along {self._expected}", module,
            )
            return
        sizes, out_sizes = (
            tuple(each[axis.dim] for axis in self.axes) for each in (shape, out_shape)
        )
        calls = self.calls.setdefault(module, [])
        if (len(shape) - 2, sizes, out_sizes) not in calls:
            calls.append((len(shape) - 2, sizes, out_sizes))
        key = tuple(a.num_rows(size) for a, size in zip(self.axes, sizes, strict=True))
        try:
            rows = _split(copy.copy(module), self.axes, path, calls).known[key]
        except UnsupportedModelError as error:
            self._complain(f"{name}: {error}", module)
            return
        is_cut_after = not _SPLIT[type(module)].is_whole_after
        self.places.append(LayerPlace(path, name, shape, out_shape, True, is_cut_after, rows))

    def split(self) -> SplitModel:
        """Replace layers.

        Raises:
            UnsupportedModelError: some cannot be.
        """
        for module in self.seen_whole & self.calls.keys():
            self.problems[
                f"{self.path_of[module]}: is called with tensors that are cut and with whole ones"
            ] = None
        if self.problems:
            raise UnsupportedModelError(
                "not everything in the model can work on a rank's rows\n  "
                + "\n  ".join(text.replace("\n", "\n    ") for text in self.problems)
                + "\nhint: layers of torch.nn in the place of functions know their rows "
                "(nn.Upsample, nn.MaxPool2d, nn.AdaptiveAvgPool2d(1) before a classifier)"
            )
        for module, calls in self.calls.items():
            _split(module, self.axes, self.path_of[module], calls).keep_numbers()
        return SplitModel(self.model, self.axes, tuple(self.places), self.is_cut_after)


def _split(
    module: nn.Module, axes: tuple[Axis, ...], path: str,
    calls: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]],
) -> SplitLayer:
    """Make a layer one that knows its rows, in place."""
    module.__class__ = _class_of(type(module))
    assert isinstance(module, SplitLayer)
    module.axes, module.path, module.known, module.numbers = axes, path, {}, {}
    for num_dims, sizes, out_sizes in calls:
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
