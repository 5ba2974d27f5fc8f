"""Samples cut into rows over ranks: one device's numbers, whatever the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from packlight.convolution import Spatial, parallelize_convolutions
from tests import convolution_models as models
from tests.convolution_cases import compared, mesh_of, on_one_device, worst_of
from tests.rank_pool import RankPool

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks for all tests; some use two or three of them."""
    pool = RankPool(4, tmp_path_factory.mktemp("convolution"))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "mesh, first, count",
    [
        ((2,), 0, 10), ((3,), 20, 15), ((4,), 45, 8), ((2, 2), 60, 8),
        pytest.param((2,), 1000, 100, marks=pytest.mark.slow),
        pytest.param((3,), 2000, 200, marks=pytest.mark.slow),
        pytest.param((4,), 3000, 100, marks=pytest.mark.slow),
        pytest.param((2, 2), 4000, 100, marks=pytest.mark.slow),
    ],
)
def test_random_chains_of_layers_are_those_of_one_device(
    pool: RankPool, mesh: tuple[int, ...], first: int, count: int
) -> None:
    for start in range(first, first + count, 10):  # a pool waits so long for each call
        seeds = [*range(start, min(start + 10, first + count))]
        for worst, where, num_run in pool.run(worst_of, seeds, mesh):
            assert worst <= TOLERANCE, where
            assert num_run in (0, len(seeds))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet": (lambda: models.ResNet(), (2, 3, 70, 40)),
    "vgg": (lambda: models.Vgg(), (2, 3, 36, 20)),
    "u-net": (lambda: models.UNet(), (1, 1, 36, 16)),
    "u-net, upsampling": (lambda: models.UNet(upsamples=True), (1, 1, 36, 16)),
    "u-net of volumes": (lambda: models.UNet(num_dims=3), (1, 1, 28, 8, 8)),
    "gated": (lambda: models.Gated(), (2, 3, 25, 9)),
}


def whole_model(name: str, mesh_shape: tuple[int, ...], dims: Any) -> dict[str, float]:
    mesh = mesh_of(mesh_shape)
    if mesh is None:
        return {}
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    alone, x = on_one_device(model), torch.randn(shape, dtype=torch.double)
    before = [id(p) for p in model.parameters()], [*model.state_dict()]
    split = parallelize_convolutions(model, mesh, Spatial(dims), x)
    assert before == ([id(p) for p in model.parameters()], [*model.state_dict()])
    return compared(split, alone, x, mesh)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_are_those_of_one_device(pool: RankPool, name: str) -> None:
    for found in pool.run(whole_model, name, (3,), 2):
        assert all(value <= TOLERANCE for value in found.values()), found


@pytest.mark.parametrize("name", ["resnet", "u-net of volumes"])
def test_two_dimensions_are_cut_over_a_mesh_of_two(pool: RankPool, name: str) -> None:
    dims = (2, 3) if name == "resnet" else (2, 4)
    for found in pool.run(whole_model, name, (2, 2), dims):
        assert all(value <= TOLERANCE for value in found.values()), found


def attempted(what: str) -> Any:
    mesh = mesh_of((4,))
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    shape, dims = (1, 3, 16, 16), 2
    if what == "far":
        model.append(nn.Conv2d(4, 4, 11, padding=5))
    elif what == "few":
        shape = (1, 3, 3, 16)
    elif what == "functions":
        model = Functions()
    elif what == "mesh":
        dims = (2, 3)
    elif what == "settings":
        model.append(nn.MaxPool2d(2, return_indices=True))
    elif what == "mode":
        model.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")))
    elif what == "classifier":
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 2))
    elif what == "positions":
        model = Positions()
    elif what == "own":
        model = nn.Sequential(Standardized(3, 4, 3))
    elif what == "sizes":
        split = parallelize_convolutions(model, mesh, Spatial(2), torch.empty(shape))
        split.model(torch.zeros(1, 3, 5, 16))
    elif what == "others":
        shape = (1, 3, 16 + dist.get_rank() // 3, 16)
    parallelize_convolutions(model, mesh, Spatial(dims), torch.empty(shape, device="meta"))


class Functions(nn.Module):
    """Calls functions where layers would know their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.max_pool2d(self.conv(x), 2), 0.5)
        return F.interpolate(x, scale_factor=2).mean((2, 3))


class Positions(nn.Module):
    """Adds a number for each position, whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 3, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places


class Standardized(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "what, words",
    [
        ("far", ["2: Conv2d: rank 0 needs a halo of 5 rows", "wider than the 4 rows of its neigh"]),
        ("few", ["0: Conv2d: 3 rows along dimension 2 of what comes in are too few for 4 ranks"]),
        ("functions", [
            "the model itself: aten.max_pool2d", "aten.upsample_nearest2d", "aten.mean looks over "
            "all rows of dimension 2", "nn.Upsample",
        ]),
        ("mesh", ["Spatial(dims=(2, 3)) on a mesh of 1 dimensions"]),
        ("settings", ["2: MaxPool2d: return_indices=True"]),
        ("mode", ["2.0: Upsample: mode='bicubic'"]),
        ("classifier", ["1: aten.", "puts dimension 2, which is cut, together with others"]),
        ("positions", ["the model itself: aten.add meets a tensor of (1, 3, 16, 16), whole"]),
        ("own", ["0: aten.convolution is not known"]),
        ("others", ["rank 3 differs from rank 0 in the example: [(1, 3, 17, 16)], where rank 0"]),
        ("sizes", ["0: this rank has (5,) rows of the input", "of which it has [(4,)]"]),
    ],
)
def test_what_cannot_be_cut_is_said_with_its_path(
    pool: RankPool, what: str, words: list[str]
) -> None:
    pool.assert_refused(words, attempted, what)
