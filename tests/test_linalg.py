"""`torch.linalg.inv`, `cholesky` and `solve`, which check their results, in planned steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import packlight

SIZE = 6
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "inv": torch.linalg.inv,
    "cholesky": torch.linalg.cholesky,
    "solve": lambda matrix: torch.linalg.solve(matrix, torch.ones(SIZE, 2)),
    "slogdet": lambda matrix: torch.linalg.slogdet(matrix).logabsdet,
    "two": lambda matrix: torch.linalg.inv(torch.linalg.cholesky(matrix)),
}


class Net(nn.Module):
    """A function of a matrix that is positive definite unless its input is zero."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(SIZE, SIZE, bias=False), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.linear(x)
        return self.function(rows @ rows.T + torch.eye(SIZE) * x.abs().max())


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_check_their_results_have_eager_bits(name: str) -> None:
    torch.manual_seed(0)
    mine, batches = Net(FUNCTIONS[name]), torch.randn(3, SIZE, SIZE)
    eager = copy.deepcopy(mine)
    step = packlight.fit(mine, loss_fn, sgd(mine), batches[0], moves=(), progress=False)
    optimizer = sgd(eager)
    for x in batches:
        optimizer.zero_grad()
        expected = loss_fn(eager, x)
        expected.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert step(x).item() == expected.item()
    assert torch.equal(mine.linear.weight, eager.linear.weight)


def test_what_eager_pytorch_refuses_is_refused_and_nothing_is_updated() -> None:
    torch.manual_seed(0)
    model, x = Net(torch.linalg.inv), torch.randn(SIZE, SIZE)
    step = packlight.fit(model, loss_fn, sgd(model), x, progress=False)
    step(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        step(torch.zeros(SIZE, SIZE))
    assert torch.equal(model.linear.weight, before["linear.weight"])
    assert step(x).isfinite()
