"""Upsampling is traced as eager PyTorch runs it: the same bits, and no more memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.outcome import observe
from packlight.backend import PacklightBackend
from tests.models import classify


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "nearest"},
        {"mode": "bilinear"},
        {"mode": "bilinear", "align_corners": True},
        {"mode": "bicubic"},
        {"mode": "nearest-exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_net_that_upsamples_keeps_eagers_bits_and_peak(
    settings: dict[str, Any], layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Upsample(scale_factor=2, **settings),
        nn.Conv2d(8, 4, 1),
    ).to(memory_format=layout)
    batch = torch.randn(2, 3, 16, 16).to(memory_format=layout), torch.randint(0, 4, (2, 16, 16))
    eager = observe(model, batch, classify)
    backend = PacklightBackend(rehearse=False, progress=False)
    mine = observe(
        model, batch, torch.compile(classify, backend=backend, fullgraph=True, dynamic=False)
    )
    assert not mine.differences(eager)
    assert mine.peak_bytes <= eager.peak_bytes
    names = [operation.name for operation in backend.compilations[-1].graph.operations]
    assert sum("upsample" in name for name in names) == 2, "forward and backward"
