"""Layers and chains of them with random settings, cut over ranks and compared with one device."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from packlight.convolution import Spatial, SplitModel, parallelize_convolutions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
LINEAR = ("linear", "bilinear", "trilinear")
PADDINGS = ("Zero", "Constant", "Reflection", "Replication", "Circular")
KINDS = (
    "convolution", "convolution", "convolution", "transposed", "max", "average", "batch norm",
    "group norm", "instance norm", "nearest", "linear", "pad",
)


@dataclass(frozen=True)
class Case:
    """A chain of layers and its input.

    Attributes:
        model: on one device, in float64.
        shape: of whole samples.
        dims: those that are cut.
    """

    model: nn.Module
    shape: tuple[int, ...]
    dims: tuple[int, ...]


def random_case(seed: int, num_axes: int = 1) -> Case:
    """Return a chain of one to three layers with random settings."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    num_dims = draw.choice([1, 2, 2, 2, 3]) if num_axes == 1 else draw.choice([2, 3])
    dims = tuple(sorted(draw.sample(range(2, 2 + num_dims), num_axes)))
    sizes = [draw.randint(4, 7) for _ in range(num_dims)]
    for dim in dims:
        sizes[dim - 2] = draw.randint(9, 26)
    channels = draw.choice([2, 4, 6])
    shape = (draw.choice([1, 2]), channels, *sizes)
    layers: list[nn.Module] = []
    x = torch.empty(shape, dtype=torch.double)
    for _ in range(draw.choice([1, 2, 3])):
        for _ in range(20):
            layer = random_layer(draw, x)
            if isinstance(layer, MAX_POOLS) and not all(isinstance(m, NORMS) for m in layers):
                continue  # which of two equal numbers is larger is decided by rounding
            try:
                made = layer.double()(x)
            except (RuntimeError, ValueError):
                continue  # no layer for so few rows
            if min(made.shape[2:]) >= 2 and all(made.shape[dim] >= 4 for dim in dims):
                layers.append(layer)
                x = made.detach()
                break
    if draw.random() < 0.25:
        pools = draw.choice(ADAPTIVE if all(isinstance(m, NORMS) for m in layers) else ADAPTIVE[:1])
        layers.append(pools[num_dims - 1](draw.choice([1, 2, 3])))
    return Case(nn.Sequential(*layers).double(), shape, dims)


def random_layer(draw: random.Random, x: torch.Tensor) -> nn.Module:
    """Return a layer for an input of this shape, with settings that may be too large for it."""
    channels, n = x.shape[1], x.ndim - 2

    def each(*choices: int) -> tuple[int, ...]:
        return tuple(draw.choice(choices) for _ in range(n))

    kind = draw.choice(KINDS)
    out_channels = draw.choice([channels, 2 * channels])
    groups = draw.choice([1, 1, 2, channels])
    if kind == "convolution":
        kernel, dilation = each(1, 2, 3, 3, 5), each(1, 1, 2)
        padding: Any = each(0, 1, 2)
        stride = each(1, 1, 2, 3)
        if draw.random() < 0.3:
            padding, stride = draw.choice(["same", "valid"]), 1
        mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
        return CONVOLUTIONS[n - 1](
            channels, out_channels, kernel, stride, padding, dilation, groups,
            bias=draw.random() < 0.7, padding_mode=mode,
        )
    if kind == "transposed":
        stride = each(1, 2, 3)
        return TRANSPOSED[n - 1](
            channels, out_channels, each(1, 2, 3, 4), stride, each(0, 0, 1),
            tuple(draw.randint(0, s - 1) for s in stride), groups, dilation=each(1, 1, 2),
        )
    if kind == "max":
        return MAX_POOLS[n - 1](
            each(2, 3), each(1, 2, 3), each(0, 1), each(1, 2), ceil_mode=draw.random() < 0.5
        )
    if kind == "average":
        more = {} if n == 1 or draw.random() < 0.7 else {"divisor_override": 5}
        return AVERAGE_POOLS[n - 1](
            draw.choice([2, 3]) if n == 1 else each(2, 3), draw.choice([1, 2, 3]),
            draw.choice([0, 1]), ceil_mode=draw.random() < 0.5,
            count_include_pad=draw.random() < 0.5, **more,
        )
    if kind == "batch norm":
        return BATCH_NORMS[n - 1](channels, momentum=draw.choice([0.1, None]))
    if kind == "group norm":
        return nn.GroupNorm(draw.choice([1, 2]), channels)
    if kind == "instance norm":
        return INSTANCE_NORMS[n - 1](channels, affine=draw.random() < 0.5)
    if kind == "pad":
        name, pads = draw.choice(PADDINGS), tuple(draw.randint(0, 2) for _ in range(2 * n))
        more = {"value": 0.5} if name == "Constant" else {}
        return getattr(nn, f"{name}Pad{n}d")(pads, **more)
    is_linear = kind == "linear"
    mode = LINEAR[n - 1] if is_linear else draw.choice(["nearest", "nearest-exact"])
    corners = draw.choice([True, False]) if is_linear else None
    if draw.random() < 0.5:
        # Where rows are rounded to the nearest, torch's own backward may round otherwise.
        factor = draw.choice([1.5, 2, 2.3] if is_linear else [1.5, 2])
        return nn.Upsample(scale_factor=factor, mode=mode, align_corners=corners)
    sizes = tuple(int(draw.uniform(0.6, 2) * s) for s in x.shape[2:])
    return nn.Upsample(sizes, mode=mode, align_corners=corners)


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh | None:
    """Return a mesh of this shape of the first ranks; None in those that are not in it."""
    ranks = torch.arange(math.prod(shape)).view(shape)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("rows", "columns")[: len(shape)])
    return mesh if dist.get_rank() < len(ranks.flatten()) else None


def sum_over(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Add up over all ranks of a mesh, in place."""
    for group in mesh.get_all_groups():
        dist.all_reduce(tensor, group=group)
    return tensor


def differences(case: Case, mesh: DeviceMesh) -> dict[str, float]:
    """Return how far outputs, gradients and statistics are from one device's, relatively."""
    x = torch.randn(case.shape, dtype=torch.double)
    dims = case.dims if len(case.dims) > 1 else case.dims[0]
    split = parallelize_convolutions(
        copy.deepcopy(case.model), mesh, Spatial(dims, far_halos=True), x
    )
    return compared(split, case.model, x, mesh)


def compared(
    split: SplitModel, alone: nn.Module, x: torch.Tensor, mesh: DeviceMesh, seed: int = 0
) -> dict[str, float]:
    """Return how far a model's rows are from those of the same model on one device."""
    whole_x, part = x.clone().requires_grad_(), split.part(x).requires_grad_()
    torch.manual_seed(seed)
    whole = alone(whole_x)
    torch.manual_seed(seed)
    made = split.model(part)
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    is_whole = not split.is_cut_after
    wanted = whole if is_whole else split.part(whole)
    (made * (weights / mesh.size() if is_whole else split.part(weights))).sum().backward()
    assert whole_x.grad is not None
    found = {
        "output": distance(made, wanted), "gradient": distance(part.grad, split.part(whole_x.grad))
    }
    gradients = [p.grad for p in alone.parameters() if p.grad is not None]
    largest = max([1.0, *[float(g.abs().max()) for g in gradients]])
    named = split.model.named_parameters()
    for (name, parameter), other in zip(named, gradients, strict=True):
        assert parameter.grad is not None
        # (some are nothing but rounding: of a bias before batch norm)
        gradient = sum_over(parameter.grad, mesh)
        found[f"gradient of {name}"] = distance(gradient, other, largest)
    for name, buffer in alone.named_buffers():
        found[name] = distance(split.model.get_buffer(name).to(x.dtype), buffer.to(x.dtype))
    return found


def distance(one: Any, other: Any, largest: float = 1.0) -> float:
    """Return the largest difference over the largest number, or over one that is given if more."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp(min=largest))


def worst_of(seeds: list[int], shape: tuple[int, ...]) -> tuple[float, str, int]:
    """Return the largest difference of many random cases, where it was, and how many ran."""
    mesh = mesh_of(shape)
    worst, words, count = 0.0, "", 0
    if mesh is None:
        return worst, words, count
    for seed in seeds:
        case = random_case(seed, len(shape))
        try:
            found = differences(case, mesh)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error
        count += 1
        name = max(found, key=found.__getitem__)
        if not found[name] <= worst:
            worst, words = found[name], f"seed {seed}, {name}: {case}"
    return worst, words, count


class OneDevicesDropout(nn.Module):
    """Dropout by positions, written out."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
        z = np.uint64(seed) + np.arange(x.numel(), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        kept = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 >= self.p
        return x * torch.from_numpy(kept).view(x.shape) / (1 - self.p)


def on_one_device(model: nn.Module) -> nn.Module:
    """Return a copy whose dropout is written out."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, OneDevicesDropout(child.p))
    return model
