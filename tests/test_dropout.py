"""Dropout on the CPU by Packlight's own operators, beside eager PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.backend import PacklightBackend
from packlight.capture.dropout import dropout, dropout_backward
from packlight.costs.measure import observe_call, same_bits

SHAPE = (4, 6, 5, 3)


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = (torch.randn(SHAPE) * 8).to(dtype)
    values.view(-1)[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return {
        "contiguous": values,
        "channels last": values.to(memory_format=torch.channels_last),
        "transposed": values.transpose(0, 2),
        "part": values[:, 1:4, ::2],
        "expanded": values[:, :1].expand(SHAPE),
        "scalar": values[1, 1, 1, 1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", layouts(torch.float32))
@pytest.mark.parametrize("p", [0.1, 0.15, 0.45, 0.5, 0.88, 1.0])
def test_both_passes_have_eager_pytorchs_bits_and_draw_its_numbers(
    dtype: torch.dtype, layout: str, p: float
) -> None:
    values = layouts(dtype)[layout].requires_grad_()
    torch.manual_seed(3)
    theirs = F.dropout(values, p)
    their_next = torch.rand(3)
    gradient = values.detach().flip(0) if values.dim() else values.detach()
    (their_gradient,) = torch.autograd.grad(theirs, values, gradient)
    torch.manual_seed(3)
    with torch.no_grad():
        ours, mask = dropout(values, p)
        my_gradient = dropout_backward(gradient, mask, p)
    assert torch.rand(3).equal(their_next), "the generator moved as far"
    assert ours.stride() == theirs.stride() and mask.dtype == torch.bool
    assert same_bits(plain(ours), plain(theirs.detach()))
    assert same_bits(plain(my_gradient), plain(their_gradient))


def plain(values: torch.Tensor) -> torch.Tensor:
    """The bits of what is no number mean nothing."""
    return values.nan_to_num(1.0, 2.0, 3.0)


def test_operators_keep_what_torch_asks_of_them() -> None:
    values, mask = torch.randn(4, 8), torch.rand(4, 8) < 0.5
    torch.library.opcheck(dropout_backward, (values, mask, 0.2))
    torch.library.opcheck(dropout, (values, 1.0))


def test_there_is_no_workspace_beside_the_results() -> None:
    values, mask = torch.randn(64, 256), torch.rand(64, 256) < 0.5
    for operator, args in (
        (torch.ops.packlight.dropout.default, (values, 0.1)),
        (torch.ops.packlight.dropout_backward.default, (values, mask, 0.2)),
    ):
        assert observe_call(operator, args, {}).workspace_bytes < 1024


class Dropping(nn.Module):
    """Layers with dropout whose results lie in memory in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.conv(x).relu(), 0.15, self.training)
        x = F.dropout(x.permute(0, 2, 3, 1), 0.45, self.training).sin()
        return F.dropout(self.head(x.mean((1, 2)))[:, ::2], 0.1, self.training)


@pytest.mark.parametrize("form", ["fit", "backend"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_steps_dropouts_are_eagers_in_every_bit(
    form: str, memory_format: torch.memory_format
) -> None:
    model = Dropping().to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    batch = torch.randn(2, 3, 9, 9).to(memory_format=memory_format)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    if form == "fit":
        step = packlight.fit(twin, loss_fn, optimizers[1], batch, None, progress=False)
        nodes = step.ready.parts[0].step.joint.module.graph.nodes
        names = [str(n.target) for n in nodes if "dropout" in str(n.target)]
        assert len(names) == 6 and all(n.startswith("packlight.") for n in names)
    else:
        compiled = torch.compile(loss_fn, backend=PacklightBackend(progress=False))

    for seed in range(3):
        torch.manual_seed(seed)
        optimizers[0].zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizers[0].step()
        torch.manual_seed(seed)
        if form == "fit":
            assert step(batch).equal(loss)
        else:
            optimizers[1].zero_grad()
            again = compiled(twin, batch)
            again.backward()
            optimizers[1].step()
            assert again.equal(loss)
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            assert same_bits(ours.detach(), theirs.detach())


def test_the_noise_of_rrelu_is_eagers_where_it_is_computed_again() -> None:
    """Around which torch.utils.checkpoint computes gradients from left-over memory."""
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(16, 64), nn.RReLU(), nn.Linear(64, 64), nn.RReLU())
    mine, batch = copy.deepcopy(eager), torch.randn(64, 16)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, mine)]

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    arguments: Any = mine, loss_fn, optimizers[1], batch
    options: Any = {"moves": packlight.EXACT_MOVES, "progress": False}
    with pytest.raises(packlight.InfeasibleBudgetError) as caught:
        packlight.plan(*arguments, 1, **options)
    step = packlight.fit(*arguments, caught.value.smallest_bytes, **options)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = loss_fn(eager, batch)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        torch.manual_seed(seed)
        assert torch.equal(step(batch), loss)
        for ours, theirs in zip(mine.parameters(), eager.parameters(), strict=True):
            assert torch.equal(ours, theirs)
