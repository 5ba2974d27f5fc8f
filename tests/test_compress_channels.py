"""Channels removed for good: models compute the same where they should, and are really smaller."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import packlight.compress as compress
from packlight.compress.errors import CompressionError
from packlight.compress.reconstruct import choose_inputs
from packlight.errors import OptionError


class Residual(nn.Module):
    """A stem, a block that is added to it, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(10)
        self.outer = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem_norm(self.stem(images)).relu()
        inner = self.inner_norm(self.inner(hidden)).relu()
        hidden = (hidden + self.outer_norm(self.outer(inner))).relu()
        pooled = nn.functional.adaptive_avg_pool2d(hidden, 2)
        return self.head(pooled.flatten(1))


def residual() -> tuple[Residual, torch.Tensor]:
    torch.manual_seed(0)
    model = Residual()
    images = torch.randn(4, 3, 8, 8)
    model(images)  # so that running statistics are not those of a new model
    return model.eval(), images


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_dead_channels_go_and_the_function_stays() -> None:
    model, images = residual()
    with torch.no_grad():
        model.inner_norm.weight[2:5] = 0
        model.inner_norm.bias[2:5] = 0
        model.outer.weight[:, 7] = 0
        for norm in (model.stem_norm, model.outer_norm):
            norm.weight[0] = norm.bias[0] = 0
        model.stem_norm.weight[1] = model.stem_norm.bias[1] = 0  # the block still writes this one
    expected = model(images)
    changes = compress.remove_dead_channels(model, images)
    assert changes == {"stem": (12, 11), "inner": (10, 6), "outer": (12, 11)}
    assert model.head.weight.shape == (5, 44)
    torch.testing.assert_close(model(images), expected)


def test_channels_that_die_with_others_go_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    )  # fmt: skip
    with torch.no_grad():
        model[4].weight[:, 1:] = 0  # four of the five are not read ...
        model[2].weight[0, 2:] = 0  # ... and the fifth reads two of the six
    inputs = torch.randn(3, 4)
    expected = model(inputs)
    assert compress.remove_dead_channels(model, inputs) == {"0": (6, 2), "2": (5, 1)}
    torch.testing.assert_close(model(inputs), expected)


def test_small_channels_go_with_all_that_is_added_to_them() -> None:
    model, images = residual()
    before = num_parameters(model)
    changes = compress.remove_channels(model, images, kept=0.5, scope="layer")
    assert changes == {"stem": (12, 6), "inner": (10, 5), "outer": (12, 6)}
    assert model(images).shape == (4, 5)
    assert num_parameters(model) < 0.4 * before
    model.train()(images).sum().backward()


def test_the_channels_with_the_smallest_weights_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    squares = model[0].weight.square().sum(1) + model[2].weight.square().sum(0)
    expected = squares.topk(3).indices.sort().values
    rows = model[0].weight.detach()[expected]
    compress.remove_channels(model, torch.ones(1, 4), kept=3 / 8)
    assert torch.equal(model[0].weight, rows)


def test_outputs_that_would_change_their_shape_are_refused() -> None:
    model, images = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError, match="would have outputs of shape"):
        compress.remove_channels(model, images, kept=0.5, fixed=["stem"])
    with pytest.raises(CompressionError, match="'steam' is no linear layer"):
        compress.remove_channels(model, images, kept=0.5, fixed=["steam"])
    with pytest.raises(OptionError, match="kept=0"):
        compress.remove_channels(model, images, kept=0)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_small_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, images = residual()
    compress.remove_channels(model, images, kept=0.5)
    compress.save(tmp_path / "m.plc", model)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh.head.weight.zero_()
    compress.load(tmp_path / "m.plc", into=fresh)
    assert torch.equal(fresh(images), model(images))


# -- ThiNet


def test_greedy_choice_finds_channels_that_hardly_add() -> None:
    """Brute force over all pairs: none reconstructs the sum better than those that were chosen."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(200, 6, generator=generator) * torch.tensor([3.0, 0.1, 0.2, 2.0, 0.1, 0.3])
    kept, scale, error = choose_inputs(parts, 2)
    wanted = parts.double().sum(1)

    def error_of(pair: tuple[int, ...]) -> float:
        columns = parts.double()[:, list(pair)]
        fitted = columns @ torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        return float((fitted - wanted).square().sum() / wanted.square().sum())

    best = min(itertools.combinations(range(6), 2), key=error_of)
    assert tuple(kept.tolist()) == best == (0, 3)
    assert error == pytest.approx(error_of(best))


@pytest.mark.parametrize("name", ["2", "5"])
def test_inputs_that_add_nothing_are_removed_without_loss(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    made = model[int(name) - 2 if name == "2" else 2]
    reader = model[int(name)]
    with torch.no_grad():
        reader.weight[:, 1::2] = 0
    images = torch.randn(8, 1, 10, 10)
    expected = model(images)
    num_inputs = reader.weight.shape[1]
    error = compress.remove_inputs(model, name, num_inputs // 2, [images], samples_per_batch=400)
    assert error < 1e-9
    assert made.weight.shape[0] == reader.weight.shape[1] == num_inputs // 2
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_reconstructed_is_named() -> None:
    model, images = residual()
    with pytest.raises(CompressionError, match="several come from one channel"):
        compress.remove_inputs(model, "head", 20, [images])
    with pytest.raises(CompressionError, match="'stem_norm' is no linear layer"):
        compress.remove_inputs(model, "stem_norm", 2, [images])
    with pytest.raises(ValueError, match="no calibration data"):
        compress.remove_inputs(model, "outer", 2, [])
    with pytest.raises(OptionError, match="has 10 input channels"):
        compress.remove_inputs(model, "outer", 11, [images])


# -- sparse structure selection


def test_factors_of_channels_that_do_nothing_reach_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
    selection = compress.ScaleSelection(model, ["0"])
    optimizer = torch.optim.SGD(
        [p for n, p in model.named_parameters() if not n.startswith("2")], lr=0.01
    )
    inputs = torch.randn(64, 3)
    wanted = model(inputs).detach()
    for _ in range(300):
        optimizer.zero_grad()
        (10 * (model(inputs) - wanted).square().mean()).backward()
        optimizer.step()
        selection.shrink(0.004)
    assert (selection.factors()["0"][4:] == 0).all()
    assert (selection.factors()["0"][:4] != 0).any()
    selection.finish()
    expected = model(inputs)
    assert compress.remove_dead_channels(model, inputs)["0"][1] <= 4
    torch.testing.assert_close(model(inputs), expected)
    with pytest.raises(CompressionError, match="'1' is no layer with a plain weight"):
        compress.ScaleSelection(model, ["1"])
