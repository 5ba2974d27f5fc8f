"""Images rearranged once: the same step up to the order of sums, within its plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.capture.read_joint import read_joint_graph
from packlight.costs.profiler import CallProfiler
from packlight.moves.channels_last import ChannelsLast, with_images_channels_last
from tests.oracles.joint import joint_graph

CONVOLUTION = torch.ops.aten.convolution.default


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )
    return model, torch.randn(4, 3, 16, 16)


def loss_fn(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).square().mean()


def test_a_step_with_images_channels_last_trains_like_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ChannelsLast, "penalty", property(lambda self: 1e-3))  # taken if it fits
    model, images = network()
    eager = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
    step = packlight.fit(
        model, loss_fn, optimizers[0], images, progress=False,
        moves=(*packlight.MOVES, "channels-last"),
    )
    assert "images channels last" in step.describe()
    for _ in range(2):
        measured = step.measured(images)
        loss = loss_fn(eager, images)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        assert measured.peak_bytes <= step.peak_bytes
        torch.testing.assert_close(measured.loss, loss.detach(), rtol=1e-5, atol=0)
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for mine, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["channels last already", "no convolution"])
def test_where_nothing_is_to_be_rearranged_that_is_said(kind: str) -> None:
    model, images = network()
    loss: Any = loss_fn
    if kind == "no convolution":
        model, images = nn.Linear(8, 8), torch.randn(4, 8)
    else:
        images = images.to(memory_format=torch.channels_last)
    step = packlight.fit(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.1), images, progress=False,
        moves=("channels-last",),
    )
    assert "without channels-last: no convolution reads images" in step.describe()


def test_all_convolutions_then_read_and_make_images_channels_last() -> None:
    model, images = network()
    joint = joint_graph(loss_fn, model, images)
    before = str(joint.module.graph)
    module = with_images_channels_last(joint.module)
    assert str(joint.module.graph) == before
    with CallProfiler(progress=False) as profiler:
        step = read_joint_graph(module, joint.num_forward_outputs, profiler.measure)
    results = [n for n in step.module.graph.nodes if n.target is CONVOLUTION]
    assert len(results) == 2
    for node in results:
        assert node.meta["val"].is_contiguous(memory_format=torch.channels_last)
