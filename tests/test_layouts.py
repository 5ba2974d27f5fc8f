"""Where PyTorch's fake kernels are wrong about strides, what runs is what eager PyTorch runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from benchmarks.zoo.outcome import observe, traced
from packlight.backend import PacklightBackend
from packlight.planner import smallest_plan


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class NormedSequence(nn.Module):
    """Batch norm over a transposed sequence, as in PatchTST."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(F.gelu(self.first(x)).transpose(1, 2)).transpose(1, 2)
        return self.last(F.gelu(y.reshape(x.shape[0], -1, 16)))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_a_view_that_the_real_tensor_does_not_have_is_a_copy_as_in_eager_pytorch() -> None:
    torch.manual_seed(0)
    model, batch = NormedSequence().train(), torch.randn(4, 6, 8)
    eager = observe(model, batch, loss_of)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        observe(model, batch, traced(loss_of))  # torch's own traced step: it has no such view
    for choose in (None, lambda graph: smallest_plan(graph).peak_bytes):
        torch._dynamo.reset()
        backend = PacklightBackend(choose_budget=choose, rehearse=False, progress=False)
        call = torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=False)
        mine = observe(model, batch, call)
        assert mine.differences(eager) == []
        assert mine.peak_bytes == backend.compilations[-1].plan.peak_bytes


def test_such_a_step_trains_by_fit_like_eager_pytorch() -> None:
    torch.manual_seed(0)
    batch, trained = torch.randn(4, 6, 8), []
    for is_planned in (True, False):
        torch.manual_seed(1)
        model = NormedSequence().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if is_planned:
            step = packlight.fit(model, loss_of, optimizer, batch, progress=False)
            step(batch)
        else:
            loss_of(model, batch).backward()
            optimizer.step()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *trained))
