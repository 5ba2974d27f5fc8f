"""Why parameters under Adam may differ by a whole step where sums are added up in another order.

Adam's first step is `lr * g / (|g| + eps)`: as large for a gradient of 1e-7 as for one of 1. Where
the true gradient of an element is as small as what float32 rounds in the sums of the others, its
sign is that of the rounding, and two orders of the same sum step in two directions. In a Fourier
layer with a loss of a spectrogram that is some element in most runs. Nothing is wrong with such a
step: gradients agree as far as float32 goes, and in float64 so do the parameters.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight

LR = 1e-3
Batch = tuple[torch.Tensor, torch.Tensor]


class Spectral(nn.Module):
    """A Fourier layer whose complex weights are a view of real ones."""

    def __init__(self, channels: int = 12, modes: int = 8) -> None:
        super().__init__()
        self.modes = modes
        self.enter, self.leave = nn.Conv1d(1, channels, 1), nn.Conv1d(channels, 1, 1)
        self.weight = nn.Parameter(0.1 * torch.randn(channels, channels, modes, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        spectrum = torch.fft.rfft(x)
        weight, mixed = torch.view_as_complex(self.weight), torch.zeros_like(spectrum)
        mixed[..., : self.modes] = torch.einsum(
            "bck,cdk->bdk", spectrum[..., : self.modes], weight
        )
        return self.leave(F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + x))


def spectrogram(x: torch.Tensor) -> torch.Tensor:
    window = torch.hann_window(32, dtype=x.dtype)
    return torch.stft(x[:, 0], 32, 8, window=window, return_complex=True).abs()


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    mine, wanted = spectrogram(model(batch[0])), spectrogram(batch[1])
    logs = (mine.clamp(1e-5).log() - wanted.clamp(1e-5).log()).abs().mean()
    return F.l1_loss(mine, wanted) + logs


def batch_of(dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 16, 1, 128, generator=generator, dtype=torch.float64).to(dtype)
    return x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_elements_whose_gradient_is_rounding_step_another_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch.manual_seed(123)
    mine, eager = Spectral().to(dtype), Spectral().to(dtype)
    eager.load_state_dict(mine.state_dict())
    batch, moves = batch_of(dtype), ("microbatch",)
    optimizer, oracle = (torch.optim.Adam(m.parameters(), LR) for m in (mine, eager))
    arguments = mine, loss_of, optimizer, batch
    with pytest.raises(packlight.InfeasibleBudgetError) as caught:
        packlight.plan(*arguments, 1, moves=moves, progress=False, accumulate=True)
    budget = caught.value.smallest_bytes
    step = packlight.fit(*arguments, budget, moves=moves, progress=False, accumulate=True)
    assert step.way.num_microbatches > 1

    exact = copy.deepcopy(eager).double()
    loss_of(exact, (batch[0].double(), batch[1].double())).backward()
    step.backward(batch)
    loss_of(eager, batch).backward()
    of_rounding = {}
    for name, truth in exact.named_parameters():
        ours, theirs, sizes = (m.get_parameter(name).grad for m in (mine, eager, exact))
        assert truth.grad is not None and ours is not None and theirs is not None
        errors = [(gradient - truth.grad).abs().max() for gradient in (ours, theirs)]
        noise = max(errors[1], 1e-12 * sizes.abs().max())
        assert errors[0] <= 8 * noise, f"{name}: as good as eager's, but for the order of sums"
        # Less than half a percent of a gradient moves its step by less than one percent.
        of_rounding[name] = truth.grad.abs() <= 200 * (errors[0] + noise)
    step.update()
    oracle.step()
    for (name, ours), theirs in zip(mine.named_parameters(), eager.parameters(), strict=True):
        differs = (ours - theirs).abs() > LR / 100
        assert of_rounding[name][differs].all(), name
        assert dtype == torch.float32 or not differs.any(), name
