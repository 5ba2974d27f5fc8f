"""Approximations as parts of planned steps: forward exact, bytes kept to, errors as measured."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError, OptionError, WayError
from packlight.moves.lossy.choice import Priced, chosen, num_within, steps_in_order
from packlight.moves.lossy.move import Lossy
from packlight.moves.lossy.packed import PackedTo
from packlight.moves.lossy.rewrite import approximated
from packlight.moves.lossy.saved import saved_values
from packlight.search.search import Search
from tests.oracles.joint import Joint, joint_graph


class Mixed(nn.Module):
    """Attention, both kinds of norms, a gate, a rectifier: what is saved by most networks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(y.reshape(x.shape))
        value, gate = self.up(self.last(x)).chunk(2, -1)
        return x + self.down(F.relu(value) * F.silu(gate))


def transformer() -> Joint:
    torch.manual_seed(0)
    first, second = Mixed(), Mixed()
    return joint_graph(lambda x: second(first(x)).square().mean(), torch.randn(4, 64, 32))


def convolutions() -> Joint:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Dropout(0.2), nn.Conv2d(8, 4, 3), nn.Tanh(),
    )
    return joint_graph(lambda x: net(x).square().mean(), torch.randn(8, 3, 16, 16))


CASES = {"transformer": transformer, "convolutions": convolutions}


def gradient(results: list[Any], joint: Joint) -> torch.Tensor:
    gradients = results[joint.num_forward_outputs :]
    return torch.cat([g.double().reshape(-1) for g in gradients if g is not None])


@pytest.mark.parametrize("case", CASES)
def test_the_forward_keeps_every_bit_and_the_gradient_is_near(case: str) -> None:
    joint = CASES[case]()
    values, exact = saved_values(joint.module), joint.run()
    assert len(values) >= 4
    errors = []
    for bits in (8, 4, 2):
        results = joint.run(approximated(joint.module, dict.fromkeys(values, PackedTo(bits))))
        for mine, right in zip(
            results[: joint.num_forward_outputs], exact[: joint.num_forward_outputs], strict=True
        ):
            assert torch.equal(mine, right)
        wrong = gradient(results, joint) - gradient(exact, joint)
        errors.append(float(wrong.norm() / gradient(exact, joint).norm()))
    assert errors[0] < 0.02 and errors == sorted(errors)


def test_gradients_of_packed_inputs_of_linear_layers_are_right_on_average() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    joint = joint_graph(lambda x: layer(x * 2).square().mean(), torch.randn(128, 64))
    (value,) = (v for v in saved_values(joint.module) if "mm" in v.role)
    exact, draws = gradient(joint.run(), joint), 60
    found = torch.stack([
        gradient(joint.run(approximated(joint.module, {value: PackedTo(2)}, seed)), joint)
        for seed in range(draws)
    ])
    deviation = (found.std(0) / math.sqrt(draws)).clamp(min=1e-12)
    assert float(((found.mean(0) - exact).abs() / deviation).max()) < 5.5


def test_a_rectifier_gets_exact_bits() -> None:
    """Rounding a small value down to zero would lose its gradient."""
    joint = joint_graph(
        lambda w, x: (F.relu(x * w) * 3).sum(), torch.ones(8192, requires_grad=True),
        torch.randn(8192),
    )
    values = saved_values(joint.module)
    packed = approximated(joint.module, dict.fromkeys(values, PackedTo(2)))
    assert "unpack_bits" in str(packed.graph)
    assert torch.equal(gradient(joint.run(packed), joint), gradient(joint.run(), joint))


def test_casts_of_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().mean()

    joint = joint_graph(loss, torch.randn(256, 64))
    weights = {(128, 64), (64, 128), (64, 64)}
    assert all(tuple(v.fake.shape) not in weights for v in saved_values(joint.module))
    assert saved_values(joint.module)


def test_steps_save_most_for_their_error() -> None:
    """Against all choices of options, for each number of bytes that the steps reach."""
    options = {
        "a": [Priced(8, 75, 0.01), Priced(4, 87, 0.1), Priced(2, 93, 0.5)],
        "b": [Priced(8, 150, 0.01), Priced(4, 174, 0.3), Priced(2, 186, 0.31)],
        "c": [Priced(8, 75, 0.2), Priced(4, 87, 0.21)],
    }
    every = [(0, 0.0)]
    for priced in options.values():
        every = [
            (b + p.saved_bytes, e + p.error**2)
            for b, e in every for p in [*priced, Priced(0, 0, 0)]
        ]
    steps = steps_in_order(options)
    for count in range(1, len(steps) + 1):
        saved = sum(step.saved_bytes for step in steps[:count])
        squared = sum(step.squared_error for step in steps[:count])
        assert squared == pytest.approx(min(e for b, e in every if b >= saved))
    assert num_within(steps, 0.015) == 2 and chosen(steps[:2]) == {"a": 8, "b": 8}


# -- planned steps


def net_and_batch() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3)]
    return nn.Sequential(*layers), torch.randn(512, 48)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.flip(0)).square().mean()


def fitted(budget: int | str, **options: Any) -> tuple[packlight.TrainStep, nn.Module]:
    model, batch = net_and_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = packlight.fit(
        model, loss_fn, optimizer, batch, budget, progress=False,
        moves=("update-in-backward", "lossy"), **options,
    )
    return step, model


@pytest.fixture(scope="module")
def plain_peak() -> int:
    return fitted("1GiB")[0].way.peak_bytes


@pytest.fixture
def only_lossy(plain_peak: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether packing is faster than recomputation is the machine's business."""
    look_at = Search._try

    def maybe(self: Search, moves: Any, found: Any) -> None:
        if any(isinstance(move, Lossy) for move in moves):
            look_at(self, moves, found)

    monkeypatch.setattr(Search, "_try", maybe)


@pytest.mark.usefixtures("only_lossy")
def test_a_planned_step_keeps_to_its_budget_and_its_limit_and_repeats_its_bits(
    plain_peak: int,
) -> None:
    model, batch = net_and_batch()
    resident = batch.nbytes + sum(p.nbytes for p in model.parameters())
    budget = resident + int(0.55 * (plain_peak - resident))
    step, model = fitted(budget, allow="packed", max_gradient_error=0.05)
    move = step.way.made(Lossy)
    assert isinstance(move, Lossy) and 0 < move.measured_error <= 0.05
    assert move.predicted_error == pytest.approx(move.measured_error, rel=0.6)
    assert f"{move.measured_error:.2%} measured" in step.describe()
    measured = packlight.measure_peak(lambda: step(batch))
    assert measured.peak_bytes + resident <= budget
    assert measured.peak_bytes + resident == pytest.approx(step.way.peak_bytes, rel=0.01)

    # The error that was told, against eager PyTorch: of the first step, SGD's is the gradient's.
    eager, _ = net_and_batch()
    before = copy.deepcopy(eager)
    loss = loss_fn(eager, batch)
    loss.backward()
    step, model = fitted(budget, allow="packed", max_gradient_error=0.05, way=step.way)
    assert float(step(batch)) == float(loss.detach())
    wrong, norm = 0.0, 0.0
    for mine, old, right in zip(
        model.parameters(), before.parameters(), eager.parameters(), strict=True
    ):
        assert right.grad is not None
        taken = (old.detach() - mine.detach()) / 0.05
        wrong += float((taken - right.grad).square().sum())
        norm += float(right.grad.square().sum())
    assert math.sqrt(wrong / norm) == pytest.approx(move.measured_error, rel=0.5)

    again, twin = fitted(budget, allow="packed", max_gradient_error=0.05, way=step.way)
    again(batch)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)

    with pytest.raises(WayError, match="lossy"):
        fitted(budget, way=step.way)
    with pytest.raises(WayError, match="gradient error"):
        fitted(budget, allow="packed", max_gradient_error=1e-4, way=step.way)


def test_a_limit_that_nothing_meets_names_the_smallest_that_something_does(
    plain_peak: int,
) -> None:
    model, batch = net_and_batch()
    resident = batch.nbytes + sum(p.nbytes for p in model.parameters())
    with pytest.raises(InfeasibleBudgetError, match="allows nothing: the least .* is 0.00"):
        fitted(resident + 10000, allow="packed", max_gradient_error=1e-6)


def test_nothing_is_approximated_unless_it_is_allowed() -> None:
    step, _ = fitted("1GiB", allow="packed")
    assert step.way.made(Lossy) is None  # it fits as it is
    model, batch = net_and_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(OptionError, match="limits what is not allowed"):
        packlight.fit(model, loss_fn, optimizer, batch, "1GiB", max_gradient_error=0.1)
    for limit in (0, -1.0, math.nan, True, "1%"):
        with pytest.raises(OptionError, match="no error relative"):
            packlight.fit(
                model, loss_fn, optimizer, batch, "1GiB", allow="packed", max_gradient_error=limit
            )
