"""What follows a break is compiled once, also where a container's method waits for its argument."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from packlight.backend import PacklightBackend


class Counting(PacklightBackend):
    """Counts the graphs that it is asked to compile."""

    num_graphs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_graphs += 1
        return super().__call__(*args, **kwargs)


class Printing(nn.Module):
    """A layer that breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print(end="")
        return self.linear(x).relu()


def appended(layers: nn.ModuleList, x: torch.Tensor) -> list[Any]:
    found: list[torch.Tensor] = []
    for layer in layers:
        found.append(layer(x))
        x = found[-1]
    return found


def updated(layers: nn.ModuleList, x: torch.Tensor) -> list[Any]:
    found: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        found.update({str(number): layer(x)})
    return list(found.values())


def inserted(layers: nn.ModuleList, x: torch.Tensor) -> list[Any]:
    found: list[torch.Tensor] = []
    for layer in layers:
        found.insert(0, layer(x))
    return found


class Net(nn.Module):
    """Three of them, whose results are collected somehow."""

    def __init__(self, collect: Callable[[nn.ModuleList, torch.Tensor], list[Any]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Printing() for _ in range(3))
        self.collect = collect

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([f.square().mean() for f in self.collect(self.layers, x)]).sum()


def gradients(net: nn.Module, forward: Callable[..., torch.Tensor], *given: Any) -> list[Any]:
    net.zero_grad()
    loss = forward(*given)
    loss.backward()
    return [loss, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("collect", [appended, updated, inserted])
def test_a_method_that_waits_for_a_piece_lets_nothing_be_compiled_twice(
    collect: Callable[[nn.ModuleList, torch.Tensor], list[Any]],
) -> None:
    torch.manual_seed(0)
    net, backend = Net(collect), Counting(10**6, progress=False)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, dynamic=False)
    counts = []
    for seed in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        ours, theirs = gradients(net, compiled, x), gradients(eager, eager, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        counts.append(backend.num_graphs)
    assert counts[0] > 1 and len(set(counts)) == 1


class Chooses(nn.Module):
    """Adds what a layer returns to a list as one element, or as many as it has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Printing()

    def forward(self, x: torch.Tensor, as_rows: bool) -> torch.Tensor:
        found: list[torch.Tensor] = []
        add = found.extend if as_rows else found.append
        add(self.layer(x))
        return torch.stack([f.sum() * len(found) for f in found]).sum()


def test_methods_are_told_apart() -> None:
    torch.manual_seed(0)
    net, x = Chooses(), torch.randn(3, 6)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend=Counting(10**6, progress=False), dynamic=False)
    for as_rows in (False, True, False, True):
        ours = gradients(net, compiled, x, as_rows)
        theirs = gradients(eager, eager, x, as_rows)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
