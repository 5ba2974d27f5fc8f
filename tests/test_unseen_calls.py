"""The backend and what dynamo never shows it: functions under `torch.compiler.disable`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from packlight.costs.peak import measure_peak
from packlight.errors import GraphBreakError, InfeasibleBudgetError

WIDE = 512


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch._dynamo.reset()


class Block(nn.Module):
    """Something to train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.layer(x)))


class Disabled(Block):
    """All of it is out of dynamo's sight."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.computed(x)


class DisabledAlone(Block):
    """So is its own code, what it calls is not."""

    @torch._dynamo.disable(recursive=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.layer(x)))


class DisabledInside(Block):
    """So is all that it calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)

    @torch.compiler.disable
    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return self.computed(x)


class Nothing(Block):
    """There is nothing to compile in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def compiled(model: nn.Module, budget: int | None) -> Any:
    options = {"progress": False, **({} if budget is None else {"budget": budget})}
    return torch.compile(model, backend="packlight", options=options)


@pytest.mark.parametrize("kind", [Disabled, DisabledAlone, DisabledInside])
def test_a_call_of_which_nothing_is_compiled_is_refused(kind: type[Block]) -> None:
    net, x = compiled(kind(), 10_000), torch.randn(4, 16)
    for _ in range(2):
        with pytest.raises(GraphBreakError, match="nothing of this call is compiled") as caught:
            net(x)
        assert caught.value.file == __file__
    with torch.no_grad():  # no gradient, no step
        assert net(x).shape == (4, 16)
    torch.compiler.set_stance("force_eager")  # what was asked for
    try:
        net(x).sum().backward()
    finally:
        torch.compiler.set_stance("default")


def test_what_has_nothing_to_compile_or_no_budget_runs() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    assert compiled(Nothing(), 10_000)(x) is x
    assert compiled(Disabled(), None)(x).shape == x.shape


def test_an_error_of_the_users_own_is_not_hidden() -> None:
    class Failing(Block):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.computed(x)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled(Failing(), 10_000)(torch.randn(4, 16))


class HalfDisabled(Block):
    """Its first half, which nobody compiles, holds much more than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, WIDE), nn.Linear(WIDE, 16)

    @torch.compiler.disable
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(F.gelu(self.wide(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.computed(self.first(x))


def step_bytes(run: Callable[[], Any]) -> int:
    return measure_peak(run, torch.device("cpu")).peak_bytes


def test_what_python_does_before_the_first_graph_counts() -> None:
    x = torch.randn(64, 16)

    def train(net: Any, model: nn.Module) -> None:
        net(x).square().mean().backward()
        model.zero_grad()

    model = HalfDisabled()
    held = step_bytes(lambda: train(model, model))
    assert held > 3 * 64 * WIDE * 4
    with pytest.raises(InfeasibleBudgetError) as caught:
        net = compiled(model, held // 2)
        for _ in range(3):
            train(net, model)
    named = caught.value.smallest_bytes
    assert held // 2 < named
    torch._dynamo.reset()
    net = compiled(model, named)
    for _ in range(4):
        assert step_bytes(lambda: train(net, model)) <= named
