"""Pruning and sharing while a model is trained, against what the papers say by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import packlight
import packlight.compress as compress
from packlight.compress.errors import CompressionError, TargetError
from packlight.compress.rate import _point
from packlight.compress.share import start_values
from packlight.errors import OptionError

# -- pruning


def test_magnitudes_are_compared_over_all_tensors_or_in_each() -> None:
    def layers() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            model[1].weight.copy_(torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
        return model

    kept = {}
    for scope in ("global", "layer"):
        model = layers()
        pruner = compress.Pruner(model, scope=scope)
        pruner.prune_to(0.5)
        pruner.finish()
        kept[scope] = [int((layer.weight != 0).sum()) for layer in model]
    assert kept == {"global": [0, 4], "layer": [2, 2]}


def test_lamp_scores_are_those_of_the_paper() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
    pruner = compress.Pruner(model, score="lamp")
    scores = pruner._scores(0)
    expected = [1 / 30, 4 / 29, 9 / 25, 1.0]
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=torch.float64))


def test_pruned_weights_stay_zero_under_an_optimizer_with_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = compress.Pruner(model)
    inputs = torch.randn(8, 20)
    for step in range(6):
        if step == 3:
            pruner.prune_to(0.2)
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = optimizer.param_groups[0]["params"][0]
    pruner.finish()
    assert int((model.weight != 0).sum()) == 40
    assert model.weight is weight and list(model.state_dict()) == ["weight", "bias"]


def test_regrowing_weights_come_back_when_they_matter_again() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.5]]))
    pruner = compress.Pruner(model, regrow=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner.prune_to(0.5)
    assert model.weight[0, 1] == 0
    (-model(torch.tensor([[0.0, 1.0]]))).sum().backward()
    optimizer.step()
    pruner.prune_to(0.5)
    assert model.weight[0].tolist() == [0.0, 1.5]


def test_movement_keeps_what_moves_away_from_zero() -> None:
    """Weights shrink by gradient descent towards 0 (first) or grow (second): the second stays."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
    pruner = compress.Pruner(model, score="movement")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -1.0]])).sum().backward()
        optimizer.step()
    pruner.prune_to(0.5)
    pruner.finish()
    assert model.weight[0, 0] == 0 and model.weight[0, 1] > 1


def test_densities_by_name_and_their_errors() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    pruner = compress.Pruner(model)
    pruner.prune_to({"1.weight": 0.3})
    assert pruner.densities() == {"0.weight": 1.0, "1.weight": pytest.approx(0.3)}
    assert pruner.density == pytest.approx(0.65)
    with pytest.raises(OptionError, match="2.weight"):
        pruner.prune_to({"2.weight": 0.3})
    with pytest.raises(OptionError, match="above 0"):
        pruner.prune_to(0.0)
    with pytest.raises(CompressionError, match="parametrized already"):
        compress.Pruner(model)
    with pytest.raises(OptionError, match="score='size'"):
        compress.Pruner(nn.Linear(2, 2), score="size")


def test_weights_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(CompressionError, match="'0.weight' has weights that are NaN"):
        compress.Pruner(model)
    with pytest.raises(CompressionError, match="'0.weight'"):
        compress.share(model, 4)
    with pytest.raises(CompressionError, match="no parameter of the model"):
        compress.share(nn.Linear(2, 2), {"bais": 2})


# -- sharing


def test_the_gradient_of_a_value_is_the_sum_over_its_members() -> None:
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [3.0, 3.0, 1.0]]))
    inputs = torch.randn(5, 3)
    plain = model.weight.detach().clone().requires_grad_()
    (inputs @ plain.T).square().sum().backward()
    sharing = compress.share(model, 2)
    model(inputs).square().sum().backward()
    (values,) = [p for p in model.parameters() if p.requires_grad]
    expected = [plain.grad[plain == 1].sum(), plain.grad[plain == 3].sum()]
    torch.testing.assert_close(values.grad, torch.stack(expected))
    sharing.finish()
    assert torch.equal(model.weight, plain)


def test_starts_of_a_codebook() -> None:
    weights = torch.cat([torch.zeros(5), torch.arange(1.0, 101.0), torch.tensor([1000.0])])
    assert start_values(weights, 3, "linear").tolist() == [1.0, 500.5, 1000.0]
    density = start_values(weights, 4, "density")
    assert len(density) == 4 and density.max() < 100
    few = start_values(weights, 4, "random", torch.Generator().manual_seed(0))
    assert len(few) == 4 and set(few.tolist()) <= set(weights.tolist()) - {0.0}
    assert start_values(torch.tensor([0.0, 2.0, 2.0, 3.0]), 4, "linear").tolist() == [2.0, 3.0]


def test_the_optimal_start_is_no_worse_than_any_partition() -> None:
    """Brute force over all ways to cut eight sorted numbers into three clusters."""
    weights = torch.randn(8, generator=torch.Generator().manual_seed(3)).sort().values
    values = start_values(weights, 3, "optimal")
    found = float((weights[:, None] - values).square().min(dim=1).values.sum())
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in weights.tensor_split([i, j]))
        for i in range(1, 7)
        for j in range(i + 1, 8)
    )
    assert found == pytest.approx(best, rel=1e-5)


def test_weights_move_to_other_values_and_zeros_stay() -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    with torch.no_grad():
        model.weight[:, :10] = 0
    sharing = compress.share(model, 4, start="optimal", learn="both", bit_weight=0.05)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs, wanted = torch.randn(64, 30), torch.randn(64, 20)
    losses = []
    for _ in range(20):
        loss = (model(inputs) - wanted).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sharing.finish()
    assert losses[-1] < losses[0]
    assert (model.weight[:, :10] == 0).all()
    assert 1 < len(torch.unique(model.weight[:, 10:])) <= 4
    assert not torch.equal(model.weight, before)


def test_what_a_bit_costs_empties_rare_values() -> None:
    torch.manual_seed(0)
    entropies = []
    for bit_weight in (0.0, 0.3):
        model = nn.Linear(50, 50, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(model.weight)
        sharing = compress.share(model, 16, learn="both", bit_weight=bit_weight)
        for _ in range(5):
            model(torch.randn(2, 50))
        sharing.finish()
        counts = torch.unique(model.weight, return_counts=True)[1].double()
        entropies.append(float(-(counts / 2500 * (counts / 2500).log2()).sum()))
    assert entropies[1] < entropies[0] - 0.5


# -- how many values


def test_more_values_go_where_they_save_most() -> None:
    """Brute force over all choices of two tensors: none within the bits has a smaller error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 10, bias=False))
    importance = {
        "0.weight": torch.rand(20, 20), "1.weight": 30 * torch.rand(10, 20)
    }  # fmt: skip
    candidates = (1, 2, 4, 8, 16)
    counts = compress.choose_num_values(
        model, 200, importance=importance, candidates=candidates
    )
    points = {
        (name, num): _point(model[index].weight.detach(), importance[name], num, "optimal")
        for index, name in enumerate(importance)
        for num in candidates
    }

    def totals(a: int, b: int) -> tuple[float, float]:
        pair = points["0.weight", a], points["1.weight", b]
        return sum(p[0] for p in pair), sum(p[1] for p in pair)

    bits, error = totals(counts["0.weight"], counts["1.weight"])
    assert bits <= 8 * 200
    within = [totals(a, b) for a, b in itertools.product(candidates, repeat=2)]
    assert error == pytest.approx(min(e for b, e in within if b <= bits + 1e-6))


def test_too_few_bytes_for_codes_are_named_with_what_would_do() -> None:
    model = nn.Linear(100, 100, bias=False)
    with pytest.raises(TargetError, match="do not fit in 100 bytes") as caught:
        compress.choose_num_values(model, 100, candidates=(4, 8))
    best = caught.value.best_bytes
    assert compress.choose_num_values(model, best, candidates=(4, 8)) == {"weight": 4}


def test_squared_gradients_are_means_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    batches = [torch.randn(1, 3) for _ in range(4)]
    found = compress.squared_gradients(model, lambda m, x: m(x).sum(), batches)
    torch.testing.assert_close(found["weight"], torch.cat(batches).square().mean(0, keepdim=True))
    assert model.weight.grad is None
    with pytest.raises(ValueError, match="no calibration data"):
        compress.squared_gradients(model, lambda m, x: m(x).sum(), [])


# -- variational dropout


def test_noise_has_the_mean_and_variance_of_noisy_weights() -> None:
    """The moments of a sum of independent normal weights, written out."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    plain = copy.deepcopy(layer)
    compress.VariationalPruner(layer, initial_log_variance=-3.0)
    inputs = torch.randn(1, 2, 4, 4).expand(20_000, -1, -1, -1)
    with torch.no_grad():
        outputs = layer(inputs)
        mean = plain(inputs[:1])
        variance = torch.nn.functional.conv2d(
            inputs[:1].square(), torch.full_like(plain.weight, math.exp(-3.0)), padding=1
        )
    torch.testing.assert_close(outputs.mean(0, keepdim=True), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(outputs.var(0, keepdim=True), variance, atol=0.0, rtol=0.08)


def test_noise_is_all_that_is_left_of_inputs_that_tell_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(10, 1, bias=False)
    pruner = compress.VariationalPruner(model, initial_log_variance=-6.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    inputs = torch.randn(500, 10)
    wanted = 3 * inputs[:, :1] - 2 * inputs[:, 1:2]
    for _ in range(300):
        errors = (model(inputs) - wanted).square()
        loss = 50 * errors.mean() + pruner.divergence()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    evaluated = model(inputs)
    pruner.finish()
    assert torch.equal(model(inputs), evaluated)
    kept = model.weight[0].nonzero()[:, 0].tolist()
    assert kept[:2] == [0, 1] and len(kept) <= 5
    assert type(model) is nn.Linear and list(model.state_dict()) == ["weight"]


def test_divergence_is_that_of_the_prior() -> None:
    """Monte Carlo over equation 12 up to its constant: differences between two ratios agree."""

    def exact(log_ratio: float) -> float:
        deviation = math.exp(0.5 * log_ratio)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(400_000, dtype=torch.float64, generator=generator)
        return float((1 + deviation * noise).abs().log().mean()) - 0.5 * log_ratio

    def found(log_ratio: float) -> float:
        layer = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        pruner = compress.VariationalPruner(layer, initial_log_variance=log_ratio)
        return pruner.divergence().item()

    for low, high in ((-4.0, -1.0), (-1.0, 1.0), (1.0, 3.0)):
        assert found(low) - found(high) == pytest.approx(exact(low) - exact(high), abs=0.02)


def test_a_model_without_layers_for_noise_is_named() -> None:
    with pytest.raises(CompressionError, match="no linear layer and no convolution"):
        compress.VariationalPruner(nn.Embedding(3, 3))


# -- with the rest of Packlight


def test_a_masked_model_trains_in_a_budget_like_in_a_loop() -> None:
    def trained(in_budget: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        pruner = compress.Pruner(model)
        pruner.prune_to(0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inputs = torch.randn(8, 16)

        def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return model(batch).square().mean()

        def plain_step(batch: torch.Tensor) -> None:
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        step = plain_step
        if in_budget:
            step = packlight.fit(model, loss_fn, optimizer, inputs, budget="1MiB")
        for _ in range(3):
            step(inputs)
        pruner.finish()
        return model[0].weight.detach()

    alone, in_budget = trained(False), trained(True)
    assert torch.equal(alone, in_budget)
    assert 0 < int((alone != 0).sum()) < alone.numel()
