"""Layers in two steps: from responses, through what is approximated already, for a given cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import packlight.compress as compress
from packlight.compress.errors import CompressionError
from packlight.compress.low_rank import fit
from packlight.errors import OptionError


def test_a_layer_whose_responses_lie_in_a_plane_is_reconstructed() -> None:
    """Its weights are of full rank; its inputs, from two numbers, are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    inputs = torch.randn(200, 2)
    expected = model(inputs)
    ranks = compress.low_rank(model, [inputs], kept=0.5, names=["1"])
    assert ranks["1"] <= 3
    torch.testing.assert_close(model(inputs), expected, atol=1e-4, rtol=1e-4)


def test_regression_is_the_best_of_its_rank() -> None:
    """Eckart and Young: for given = identity-like data it is the truncated SVD."""
    torch.manual_seed(0)
    given = torch.linalg.qr(torch.randn(50, 6, dtype=torch.float64)).Q
    given = given - given.mean(0)
    given = torch.linalg.qr(given).Q
    matrix = torch.randn(5, 6, dtype=torch.float64)
    left, right, bias = fit(given, given @ matrix.T, 2, relu=False)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ right, u[:, :2] * s[:2] @ v[:2], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bias, torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_looking_through_the_relu_is_better_than_not() -> None:
    torch.manual_seed(0)
    given = torch.randn(600, 10, dtype=torch.float64)
    wanted = given @ torch.randn(10, 10, dtype=torch.float64) - 1.0

    def error(relu: bool) -> float:
        left, right, bias = fit(given, wanted, 4, relu=relu)
        guess = (given @ right.T @ left.T + bias).clamp_min(0)
        return float((guess - wanted.clamp_min(0)).square().mean())

    assert error(True) < 0.95 * error(False)


def test_convolutions_are_factored_for_a_share_of_the_multiplications() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10),
    )  # fmt: skip
    images = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
    counts = {"0": 16 * 27 * 64, "2": 16 * 144 * 9, "5": 144 * 10}
    ranks = compress.low_rank(model, [images[:8], images[8:]], kept=0.5)
    places = {"0": 64, "2": 9, "5": 1}
    sizes = {"0": 16 + 27, "2": 16 + 144, "5": 10 + 144}
    left_over = sum(
        ranks[n] * sizes[n] * places[n] if n in ranks else counts[n] for n in counts
    )
    assert left_over <= 0.5 * sum(counts.values())
    with torch.no_grad():
        found = model(images)
    assert found.shape == expected.shape
    assert float((found - expected).square().mean() / expected.var()) < 0.5
    model(images).sum().backward()


def test_what_cannot_be_factored_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    inputs = torch.randn(10, 4)
    with pytest.raises(CompressionError, match="is possible"):
        compress.low_rank(model, [inputs], kept=0.1)
    with pytest.raises(CompressionError, match="'1' is no linear layer"):
        compress.low_rank(model, [inputs], kept=0.5, names=["1"])
    with pytest.raises(ValueError, match="no calibration data"):
        compress.low_rank(model, [], kept=0.5)
    with pytest.raises(OptionError, match="one of multiplications, parameters"):
        compress.low_rank(model, [inputs], kept=0.5, cost="seconds")
    with pytest.raises(CompressionError, match="has groups"):
        compress.spatial(nn.Conv2d(4, 4, 3, groups=2), 2)
