"""Few-bit activations, randomized linear layers: exact forwards, errors as published or less."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import packlight
from packlight import lossy
from packlight.errors import OptionError, UnsupportedModelError
from packlight.lossy import few_bit, levels
from packlight.lossy.sketch import KINDS
from packlight.moves.lossy.activations import FewBit
from packlight.moves.lossy.linear import Sketched
from packlight.moves.lossy.rewrite import approximated
from packlight.moves.lossy.saved import saved_values
from tests.oracles.joint import Joint, joint_graph

# Squared L2 errors of GELU's derivative at 1 to 4 bits that others report.
PUBLISHED = (0.1410, 0.0406, 0.0119, 0.0031)

Activation = Callable[[torch.Tensor], torch.Tensor]
SMOOTH: dict[str, Activation] = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "mish": F.mish, "elu": F.elu, "selu": F.selu, "softplus": F.softplus, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
}
EXACT: dict[str, Activation] = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
}


def gradients(joint: Joint, module: fx.GraphModule | None = None) -> torch.Tensor:
    results = joint.run(module)[joint.num_forward_outputs :]
    return torch.cat([g.reshape(-1) for g in results if g is not None])


def derivative(function: Activation, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    return found


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("bits", few_bit.BITS)
def test_a_tables_error_is_the_one_it_states(name: str, bits: int) -> None:
    """Integrated on a fine grid, with the derivative that autograd has in float64."""
    table = few_bit.optimal_table(name, bits)
    points, width = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 1e-4 - 10, 1e-4
    steps = torch.bucketize(points, torch.tensor(table.edges, dtype=torch.float64))
    level = torch.tensor(table.levels, dtype=torch.float64)[steps]
    squared = (derivative(SMOOTH[name], points) - level).square().sum() * width
    assert float(squared) == pytest.approx(table.squared_error, rel=2e-3)
    if name == "gelu":
        assert round(table.squared_error, 4) <= PUBLISHED[bits - 1]


def test_no_shifted_edge_makes_a_table_better() -> None:
    points, width = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 1e-4 - 10, 1e-4
    exact = derivative(F.silu, points)
    edges = torch.tensor(few_bit.optimal_table("silu", 2).edges, dtype=torch.float64)

    def error(edges: torch.Tensor) -> float:
        steps = torch.bucketize(points, edges)
        means = torch.stack([exact[steps == k].mean() for k in range(len(edges) + 1)])
        return float((exact - means[steps]).square().sum() * width)

    for place in range(len(edges)):
        for shift in (-0.05, 0.05):
            moved = edges.clone()
            moved[place] += shift
            assert error(moved) > error(edges)


def test_tables_are_those_that_the_script_makes() -> None:
    function, slope, jumps = levels.FUNCTIONS["elu"]
    edges, steps, error = levels.best_steps(function, slope, 2, jumps)
    table = few_bit.optimal_table("elu", 1)
    assert table.edges == pytest.approx(edges) and table.levels == pytest.approx(steps)
    assert table.squared_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("bits", few_bit.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_and_operators_agree_with_a_lookup(bits: int, dtype: torch.dtype) -> None:
    table = few_bit.optimal_table("gelu", bits)
    for count in (0, 1, 7, 255, 256, 257, 3001):
        x, gradient = (2 * torch.randn(2, count)).to(dtype)
        if count == 3001:
            x[700] = math.inf
        kept = few_bit.derivative_codes(x, table.edges, table.codes, bits, (1,))
        assert kept.nbytes == few_bit.code_bytes(count, bits) <= count * (bits / 8 + 1 / 256) + 5
        found = few_bit.times_derivative(gradient, kept, table.levels, bits, (1,))
        steps = torch.bucketize(x.double(), torch.tensor(table.edges, dtype=torch.float64))
        right = (gradient.float() * torch.tensor(table.levels)[steps]).to(dtype)
        right[512:768] = math.nan if count == 3001 else right[512:768]
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
        flags, packed = few_bit._parts(other := torch.empty_like(kept), count)
        few_bit._encode_by_operators(
            x, few_bit._rounded_down(table.edges), torch.tensor(table.codes), bits, flags, packed
        )
        assert torch.equal(kept, other)
        again = torch.empty_like(found)
        few_bit._multiply_by_operators(
            gradient, flags, packed, torch.tensor(table.levels), bits, again
        )
        torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*SMOOTH, *EXACT])
def test_functions_are_drop_in(name: str) -> None:
    mine = (lambda x: lossy.functional.gelu(x, "tanh")) if name == "gelu_tanh" else getattr(
        lossy.functional, name
    )
    x = torch.cat([torch.tensor([-6.0, -3, -1, 0, 1, 3, 6]), 2 * torch.randn(500)]).view(3, -1)
    theirs = (SMOOTH | EXACT)[name]
    assert torch.equal(mine(x), theirs(x))
    error = (derivative(mine, x) - derivative(theirs, x)).abs().max()
    assert float(error) <= (0.0 if name in EXACT else 0.6)


def test_scales_of_celu_and_softplus_scale_their_tables() -> None:
    x = torch.linspace(-8, 8, 5000)
    for mine, theirs in (
        (lambda x: lossy.functional.celu(x, 2.5, 4), lambda x: F.celu(x, 2.5)),
        (lambda x: lossy.functional.softplus(x, 0.5, 4), lambda x: F.softplus(x, 0.5)),
    ):
        assert float((derivative(mine, x) - derivative(theirs, x)).abs().max()) < 0.08


def test_what_is_kept_are_bits_and_not_bytes() -> None:
    x = torch.randn(1 << 14, requires_grad=True)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        lossy.functional.gelu(x, bits=3)
    assert saved == [(1 << 14) * 3 // 8 + 64]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: lossy.FewBitActivation(nn.Softsign()), "derivative of Softsign"),
    (lambda: lossy.FewBitActivation(nn.GELU(), bits=5), "5 bits"),
    (lambda: lossy.FewBitActivation(nn.ELU(0.5)), "alpha=0.5"),
    (lambda: lossy.functional.gelu(torch.zeros(1, dtype=torch.float64)), "float64"),
    (lambda: lossy.optimal_table("softsign", 1), "softsign"),
    (lambda: lossy.RandomizedLinear(2, 2, fraction=1.5), "fraction=1.5"),
    (lambda: lossy.RandomizedLinear(2, 2, kind="magic"), "magic"),
    (lambda: lossy.few_bit_activations(nn.GELU()), "the model itself"),
])
def test_what_has_no_approximation_is_refused_by_name(
    make: Callable[[], object], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        make()


@pytest.mark.parametrize("function", [lossy.functional.gelu, lambda x: lossy.functional.linear(
    x, torch.ones(3, 8)
)])
def test_differentiating_twice_is_refused_by_name(function: Activation) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="cannot be differentiated twice"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_randomized_weight_gradient_is_right_on_average(kind: str) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(4, 32, 16) * torch.rand(4, 32, 1).exp(), torch.randn(4, 32, 4)
    weight, bias = torch.randn(4, 16, requires_grad=True), torch.zeros(4, requires_grad=True)
    x.requires_grad_()
    inputs = (weight, x, bias)
    right = torch.autograd.grad(F.linear(x, weight, bias), inputs, gradient)
    draws = [
        torch.autograd.grad(
            lossy.functional.linear(x, weight, bias, 0.25, kind, seed), inputs, gradient
        )
        for seed in range(150)
    ]
    found = torch.stack([draw[0] for draw in draws])
    deviation = found.std(0) / math.sqrt(len(draws))
    assert float(((found.mean(0) - right[0]).abs() / deviation).max()) < 4.5
    torch.testing.assert_close(draws[0][1], right[1])
    torch.testing.assert_close(draws[0][2], right[2])
    again = torch.autograd.grad(
        lossy.functional.linear(x, weight, bias, 0.25, kind, 0), inputs, gradient
    )
    assert torch.equal(again[0], draws[0][0])


def test_a_few_large_rows_are_kept_for_sure() -> None:
    """The gradient that they alone make is exact."""
    x = torch.zeros(100, 8)
    x[::10] = torch.randn(10, 8)
    weight = torch.randn(3, 8, requires_grad=True)
    gradient = torch.randn(100, 3)
    (found,) = torch.autograd.grad(lossy.functional.linear(x, weight, None, 0.2), weight, gradient)
    torch.testing.assert_close(found, gradient.T @ x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does
def test_a_converted_model_trains_like_its_twin_in_a_planned_step_too() -> None:
    torch.manual_seed(0)
    first, second, third = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)
    model = nn.Sequential(first, nn.GELU(), second, nn.ReLU(), third)
    weights = [*model.parameters()]
    assert lossy.few_bit_activations(model) == ["1", "3"]
    assert lossy.randomized_linears(model, 0.5) == ["0", "2", "4"]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    batch = torch.randn(256, 16)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch[:, :4]).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    eager = []
    loss_fn(model, batch).backward()
    eager = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    step = packlight.fit(model, loss_fn, optimizer, batch, progress=False)
    losses = [float(step(batch))]
    for old, new, gradient in zip(before, model.parameters(), eager, strict=True):
        torch.testing.assert_close(old - new.detach(), 0.05 * gradient, rtol=1e-3, atol=1e-6)
    losses += [float(step(batch)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [*SMOOTH, *EXACT])
def test_the_move_makes_the_gradients_of_the_functions(name: str) -> None:
    function = (SMOOTH | EXACT)[name]
    mine = (lambda x: lossy.functional.gelu(x, "tanh", 1)) if name == "gelu_tanh" else (
        lambda x: getattr(lossy.functional, name)(x, **({"bits": 1} if name in SMOOTH else {}))
    )
    x, weight = 2 * torch.randn(64, 128), torch.ones(128, requires_grad=True)
    joint = joint_graph(lambda w, x: (function(x * w) * 3).sum(), weight, x)
    (value,) = (v for v in saved_values(joint.module) if FewBit(1).suits(v))
    found = gradients(joint, approximated(joint.module, {value: FewBit(1)}))
    (right,) = torch.autograd.grad((mine(x * weight) * 3).sum(), weight)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def test_the_move_sketches_inputs_of_linear_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    joint = joint_graph(lambda x: layer(torch.tanh(x)).square().mean(), torch.randn(4, 64, 64))
    (value,) = saved_values(joint.module)
    assert Sketched(0.5).suits(value)
    assert Sketched(0.25).kept_bytes(value) == 64 * (64 * 4 + 12)
    right = gradients(joint)
    found = torch.stack([
        gradients(joint, approximated(joint.module, {value: Sketched(0.25)}, seed))
        for seed in range(100)
    ])
    deviation = (found.std(0) / 10).clamp(min=1e-9)
    assert float(((found.mean(0) - right).abs() / deviation).max()) < 5
    assert float(found.std(0).max()) > 0
