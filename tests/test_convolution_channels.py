"""Convolutions with some filters or channels on each rank: one device's numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.convolution import Channels, Filters, parallelize_convolutions
from tests.convolution_cases import distance, mesh_of, on_one_device
from tests.rank_pool import RankPool

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("channels"))
    yield pool
    pool.close()


class Pair(nn.Module):
    """Filters, what works channel by channel, and channels; with a way around."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(4, 12, 3, padding="same", padding_mode="circular")
        self.between = nn.Sequential(
            nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.GroupNorm(4, 24), nn.PReLU(24),
            nn.Dropout(0.25), nn.Upsample(scale_factor=2), nn.InstanceNorm2d(24, affine=True),
            nn.MaxPool2d(2),
        )
        self.down = nn.Conv2d(24, 4, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.between(self.up(x))
        return x + F.gelu(self.down(y * torch.sigmoid(y)))


class Net(nn.Module):
    """Pairs, a gathered layer, transposed and grouped ones, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.pairs = nn.Sequential(Pair(), Pair())
        self.gathered = nn.Conv2d(4, 6, 1)
        self.wide = nn.ConvTranspose2d(6, 8, 2, 2)
        self.narrow = nn.ConvTranspose2d(8, 6, 3, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.last = nn.Conv2d(6, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(F.silu(self.wide(self.gathered(self.pairs(self.stem(x))))))
        x = self.pool(self.last(F.relu(self.grouped(x))))
        return self.head(F.relu(self.hidden(torch.flatten(x, 1))))


PLAN = {
    "pairs.*.up": Filters(), "pairs.*.down": Channels(), "gathered": Filters(gather=True),
    "wide": Filters(), "narrow": Channels(), "grouped": Filters(), "last": Channels(),
    "hidden": Filters(), "head": Channels(),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, 3, 12, 12, generator=generator).double(),
         torch.randint(5, (2,), generator=generator))
        for _ in range(3)
    ]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def differences() -> dict[str, float]:
    """Return how far outputs, gradients, statistics and state are from one device's."""
    mesh, alone, model = mesh_of((2,)), on_one_device(net()), net()
    x = batches()[0][0]
    parts = parallelize_convolutions(model, mesh, PLAN, x)
    state = parts.whole_state()
    found = {f"state {n}": distance(state[n], t) for n, t in alone.state_dict().items()
             if t.is_floating_point()}
    whole_x, own_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    whole = alone(whole_x)
    torch.manual_seed(3)
    made = model(own_x)
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    (made * weights).sum().backward()
    found |= {"output": distance(made, whole), "gradient": distance(own_x.grad, whole_x.grad)}
    rank = mesh.get_local_rank()
    for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        gradient = other.grad
        for dim in range(one.ndim):
            if one.shape[dim] != other.shape[dim]:
                gradient = gradient.chunk(2, dim)[rank]
        found[f"gradient of {name}"] = distance(one.grad, gradient)
    state = parts.whole_state()
    for name, buffer in alone.named_buffers():
        found[name] = distance(state[name].double(), buffer.double())
    halves = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in net().parameters())
    assert halves < 0.6
    assert "1/2 of the input channels" in parts.describe()
    return found


def test_filters_and_channels_are_those_of_one_device(pool: RankPool) -> None:
    for found in pool.run(differences):
        assert all(value <= TOLERANCE for value in found.values()), found


def planned() -> tuple[list[float], int, int, int]:
    model, mesh = net(), mesh_of((2,))
    parallelize_convolutions(model, mesh, PLAN, batches()[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = packlight.fit(
        model, loss_of, optimizer, batches()[0], mesh=mesh,
        parallel=packlight.Parallel(tensor="rows"), moves=("update-in-backward",),
    )
    torch.manual_seed(3)
    losses = [float(step(batch)) for batch in batches()[:-1]]
    measured = step.measured(batches()[-1])
    names = [o.name for o in step.profile.graph.operations]
    sums = sum(name.startswith("packlight.all_reduce") for name in names)
    return [*losses, float(measured.loss)], sums, measured.peak_bytes, step.peak_bytes


def test_parts_train_in_a_planned_step_and_pairs_say_nothing_in_between(pool: RankPool) -> None:
    model, losses = on_one_device(net()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(3)
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for found, num_sums, peak, predicted in pool.run(planned):
        assert found == pytest.approx(losses, rel=1e-12)
        # Five pairs, one sum forward and one backward each; the gathered layer's backward.
        assert num_sums == 5 + 5 + 1
        assert predicted - 64 <= peak <= predicted


class Meeting(nn.Module):
    """A convolution's channels times one parameter that all ranks have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * self.scale)


def attempted(what: str) -> Any:
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    plan: dict[str, Any] = {"0": Filters(), "1": Channels()}
    if what == "uneven":
        plan = {"1": Filters(gather=True)}
    elif what == "alone":
        plan = {"0": Filters()}
    elif what == "result":
        model, plan = model[:1], {"0": Filters()}
    elif what == "nobody":
        plan["2"] = Filters()
    elif what == "meets":
        model, plan = Meeting(), {"up": Filters(), "down": Channels()}
    parallelize_convolutions(model, mesh_of((2,)), plan, torch.empty(1, 3, 8, 8))


@pytest.mark.parametrize(
    "what, words",
    [
        ("uneven", "1: Conv2d: 3 filters have no equal parts for 2 ranks"),
        ("alone", "1: Conv2d: needs all channels, of which each rank has a part"),
        ("result", "the model itself: its result is this rank's channels"),
        ("nobody", "no convolution or linear layer is '2' of the plan"),
        ("meets", "the model itself: aten.mul meets a tensor of (), whole on each rank"),
    ],
)
def test_what_cannot_be_split_is_said_with_its_path(pool: RankPool, what: str, words: str) -> None:
    pool.assert_refused(words, attempted, what)


def test_copies_keep_their_parts(pool: RankPool) -> None:
    for same in pool.run(copied):
        assert same


def copied() -> bool:
    model, x = net(), batches()[0][0]
    parallelize_convolutions(model, mesh_of((2,)), PLAN, x)
    return torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
