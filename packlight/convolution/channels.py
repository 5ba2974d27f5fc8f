"""Weights of convolutions in parts: each rank has some filters, or works on some channels.

Between a layer whose filters are split and one whose input channels are, activations are this
rank's channels and nothing is said: what works channel by channel (norms, depthwise and grouped
convolutions, pooling, activations) has its own part.

All ranks have the same samples and the same loss; gradients are those of one device, of parts and
of whole parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from packlight.convolution.axis import Axis, SplitLayer
from packlight.convolution.dropout import SplitDropout
from packlight.convolution.parts import Channels, Filters, PartLayer, Style
from packlight.convolution.tracer import Call, Tracer
from packlight.convolution.watch import Cut
from packlight.errors import OptionError, UnsupportedModelError
from packlight.ranks.collectives import all_gather, peers_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_WITH_WEIGHTS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
# Layers that do the same to each channel, whichever there are.
_EACH_CHANNEL = (
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Upsample, nn.PixelShuffle,
    *(getattr(nn, f"{kind}{n}d") for n in (1, 2, 3)
      for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad",
                   "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")),
)


@dataclass(frozen=True)
class PartPlace:
    """Where a layer's input, result and weights lie.

    Attributes:
        path: of the layer.
        kind: its class, as it was.
        weights: what this rank has of them, in words.
        shape: of its input, all ranks together.
        is_cut: whether the input is this rank's channels.
        out_shape: of its result.
        is_cut_after: whether the result is.
    """

    path: str
    kind: str
    weights: str
    shape: tuple[int, ...]
    is_cut: bool
    out_shape: tuple[int, ...]
    is_cut_after: bool


@dataclass(frozen=True)
class PartModel:
    """A model of which this rank has a part.

    Attributes:
        model: it, changed in place.
        axis: the ranks.
        layers: where everything lies, in the order in which layers run.
    """

    model: nn.Module
    axis: Axis
    layers: tuple[PartPlace, ...]

    def describe(self) -> str:
        """Return a table of where each layer's input, result and weights lie."""
        width = max([len(layer.path) for layer in self.layers], default=0)
        lines = [f"channels over {self.axis.name}={self.axis.peers.size}"]
        for layer in self.layers:
            one, other = (
                f"{tuple(shape[1:])} {'part' if is_cut else 'whole'}"
                for shape, is_cut in (
                    (layer.shape, layer.is_cut), (layer.out_shape, layer.is_cut_after)
                )
            )
            lines.append(
                f"{layer.path:<{width}}  {layer.kind:<16} {one} -> {other}  {layer.weights}"
            )
        return "\n".join(lines)

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the model on one device; all ranks call it at once."""
        state = dict(self.model.state_dict())
        for path, module in self.model.named_modules():
            for name, dim in module.parts.items() if isinstance(module, PartLayer) else ():
                full = f"{path}.{name}".lstrip(".")
                rows = state[full].movedim(dim, 0).contiguous()
                whole = all_gather(rows, self.axis.peers.size, self.axis.group_name)
                state[full] = whole.movedim(0, dim).contiguous()
        return state


class Parts:
    """Sees on whole samples which part of each layer a rank gets, and makes it that.

    Args:
        model: whole, the same on all ranks.
        mesh: of the ranks, of one dimension.
        plan: how layers with weights are split, by patterns of their paths.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, plan: dict[str, Style]) -> None:
        if mesh.ndim != 1:
            raise OptionError(f"channels over a mesh of {mesh.ndim} dimensions\nhint: one of them")
        name = (mesh.mesh_dim_names or ("ranks",))[0]
        self.model, self.axis = model, Axis(1, peers_of(mesh.get_group()), name)
        paths = {path: module for path, module in model.named_modules()}
        self.style_of: dict[nn.Module, Style] = {}
        for pattern, style in plan.items():
            found = [m for path, m in paths.items() if fnmatchcase(path, pattern)]
            found = [m for m in found if type(m) in _WITH_WEIGHTS]
            if not found:
                raise OptionError(f"no convolution or linear layer is {pattern!r} of the plan")
            self.style_of.update(dict.fromkeys(found, style))
        kinds = (
            *_WITH_WEIGHTS, *_BATCH_NORMS, nn.GroupNorm, nn.PReLU, *_DROPOUTS, *_EACH_CHANNEL,
        )
        self.tracer = Tracer(model, kinds, (None,), self._after, meets_whole=False)

    def _after(self, module: nn.Module, cut: Cut) -> Cut:
        style = self.style_of.get(module)
        if style is not None:
            return (1,) if isinstance(style, Filters) and not style.gather else (None,)
        return cut

    def split(self, arguments: tuple[Any, ...]) -> PartModel:
        """Make all layers this rank's parts.

        Raises:
            UnsupportedModelError: some cannot be; nothing was changed.
        """
        self.tracer.trace(arguments)
        parts: dict[nn.Module, tuple[dict[str, int], bool]] = {}
        places = []
        for call in self.tracer.calls:
            try:
                found = self._parts(call)
            except UnsupportedModelError as error:
                self.tracer.complain(f"{call.kind}: {error}", call.module)
                continue
            is_whole = call.cut == (None,)
            if parts.setdefault(call.module, (found, is_whole)) != (found, is_whole):
                self.tracer.complain("is called with parts and with whole channels", call.module)
            after = self._after(call.module, call.cut)
            places.append(PartPlace(
                call.path, call.kind, self._words(call.module, found), call.shape, not is_whole,
                call.out_shape, after != (None,),
            ))
        if self.tracer.is_cut_after:
            self.tracer.complain("its result is this rank's channels, and no loss's", self.model)
        self.tracer.refuse(
            "Filters() before and Channels() behind what works channel by channel; "
            "Filters(gather=True) where all ranks need all channels"
        )
        for module, (found, is_whole) in parts.items():
            self._make(module, found, is_whole)
        return PartModel(self.model, self.axis, tuple(places))

    def _words(self, module: nn.Module, parts: dict[str, int]) -> str:
        if "weight" not in parts:
            return "whole" if [*module.parameters()] else ""
        kind = "input channels" if isinstance(self.style_of.get(module), Channels) else "filters"
        return f"1/{self.axis.peers.size} of the {kind}"

    def _parts(self, call: Call) -> dict[str, int]:
        """Return along which dimension each of a layer's tensors is split."""
        module: Any = call.module
        style = self.style_of.get(module)
        is_cut, num_ranks = call.cut == (1,), self.axis.peers.size
        if call.cut not in ((1,), (None,)):
            raise UnsupportedModelError(f"its channels lie along dimension {call.cut[0]}")
        if style is None and not is_cut:
            return {}
        given = {name for name in ("weight", "bias", "running_mean", "running_var")
                 if getattr(module, name, None) is not None}
        if isinstance(module, _WITH_WEIGHTS):
            weights = self._weights(module, style, is_cut, len(call.shape))
            return {
                name: dim for name, dim in weights.items()
                if name in given
            }
        channels = module.num_groups if isinstance(module, nn.GroupNorm) else call.shape[1]
        _refuse_uneven("groups" if isinstance(module, nn.GroupNorm) else "channels",
                       channels, num_ranks)
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            raise UnsupportedModelError("one slope for all channels: its gradient is all ranks'")
        if isinstance(module, nn.PixelShuffle):
            _refuse_uneven("channels of the result", call.out_shape[1], num_ranks)
        return dict.fromkeys(sorted(given), 0)

    def _weights(
        self, module: Any, style: Style | None, is_cut: bool, num_dims: int
    ) -> dict[str, int]:
        is_transposed, num_ranks = isinstance(module, _TRANSPOSED), self.axis.peers.size
        groups = getattr(module, "groups", 1)
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        if isinstance(module, nn.Linear) and num_dims != 2:
            raise UnsupportedModelError("its input has more dimensions than (batch, features)")
        if isinstance(style, Channels):
            if groups > 1:
                raise UnsupportedModelError(
                    "a convolution in groups adds up nothing over ranks\nhint: leave it out of the "
                    "plan: it works on the channels that it gets"
                )
            _refuse_uneven("input channels", inputs, num_ranks)
            return {"weight": 0 if is_transposed else 1}
        if groups > 1:
            _refuse_uneven("groups", groups, num_ranks)
        elif is_cut:
            raise UnsupportedModelError(
                "needs all channels, of which each rank has a part\nhint: Channels() for it, or "
                "Filters(gather=True) for the layer before"
            )
        _refuse_uneven("filters", outputs, num_ranks)
        return {"weight": 1 if is_transposed and groups == 1 else 0, "bias": 0}

    def _make(self, module: nn.Module, parts: dict[str, int], takes_whole: bool) -> None:
        style, num_ranks = self.style_of.get(module), self.axis.peers.size
        if isinstance(module, _DROPOUTS) and not takes_whole:
            self._make_dropout(module)
            return
        if not parts and style is None:
            return
        kind = type(module)
        module.__class__ = type(f"Part{kind.__name__}", (PartLayer, kind), {})
        assert isinstance(module, PartLayer)
        module.axis, module.style, module.parts = self.axis, style, parts
        module.takes_whole = takes_whole
        module.narrows = isinstance(style, Channels) or getattr(module, "groups", 1) > 1
        module.split()
        settings: Any = module
        is_of_channels = isinstance(style, Channels)
        for name in (
            "in_channels" if is_of_channels else "out_channels",
            "in_features" if is_of_channels else "out_features",
            "num_features", "num_groups", "num_channels", "num_parameters",
        ):
            if hasattr(settings, name):
                setattr(settings, name, getattr(settings, name) // num_ranks)
        if getattr(settings, "groups", 1) > 1:
            settings.groups //= num_ranks
            settings.in_channels //= num_ranks

    def _make_dropout(self, module: nn.Module) -> None:
        kind = type(module)
        module.__class__ = type(f"Split{kind.__name__}", (SplitDropout, kind), {})
        assert isinstance(module, SplitLayer)
        module.axes, module.path, module.known, module.numbers = (self.axis,), "", {}, {}
        for call in self.tracer.calls:
            if call.module is module:
                module.path = call.path
                module.learn((call.shape[1],), (call.shape[1],))


def _refuse_uneven(what: str, count: int, num_ranks: int) -> None:
    if count % num_ranks:
        raise UnsupportedModelError(
            f"{count} {what} have no equal parts for {num_ranks} ranks\nhint: "
            f"{math.gcd(count, num_ranks)} ranks can share them"
        )

