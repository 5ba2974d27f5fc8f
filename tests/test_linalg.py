"""`torch.linalg.inv`, `cholesky` and `solve`, which check their results, in planned steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import packlight
from tests.oracles.eager_loop import assert_same_bits, twins

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
    batches = torch.randn(3, SIZE, SIZE)
    mine, eager = twins(Net(FUNCTIONS[name]), loss_fn, sgd)
    step = packlight.fit(
        mine.model, loss_fn, mine.optimizer, batches[0], moves=(), progress=False
    )
    for x in batches:
        assert step(x).item() == eager.step(x).item()
    assert_same_bits(mine, eager)


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
