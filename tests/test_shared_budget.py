"""Graphs that nothing breaks, in loops: forwards and backwards that share one budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from packlight.backend import PacklightBackend
from packlight.capture.dynamo import plain_errors
from packlight.costs.peak import measure_peak
from packlight.errors import InfeasibleBudgetError, UnsupportedModelError
from packlight.planner.path import order_of, piece_schedule
from packlight.planner.pieces import keeping_little
from packlight.planner.plain import plain_schedule
from packlight.planner.shrink import backward_peak_bytes, with_smaller_backward
from packlight.step import live_after_forward, simulate
from tests.oracles.graphs import graphs

Loop = Callable[[Callable[..., Any], list[torch.Tensor]], torch.Tensor]


class Encoder(nn.Module):
    """Layers with many activations, dropout among them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.dropout(F.gelu(layer(x)), 0.1)
        return x


class Scored(Encoder):
    """Returns its own loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def contrast(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    first, second = (F.normalize(net(batch), dim=1) for batch in batches[:2])
    loss = (first - second).square().mean()
    loss.backward()
    return loss.detach()


def triplet(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    anchor, near, far = (net(batch) for batch in batches[:3])
    loss = F.triplet_margin_loss(anchor, near, far)
    loss.backward()
    return loss.detach()


def oldest_first(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    losses = [net(batch).square().mean() for batch in batches[:3]]
    for loss in losses:
        loss.backward()
    return torch.stack([loss.detach() for loss in losses])


def accumulated(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for batch in batches:
        loss = net(batch).square().mean() / len(batches)
        loss.backward()
        total = total + loss.detach()
    return total


def with_a_look_before(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    """A forward whose backward never comes, dropped, then two that are trained on."""
    assert net(batches[2]).shape == batches[2].shape
    return contrast(net, batches)


def of_two_lengths(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    losses = [net(batch).square().mean() for batch in (batches[0], batches[1][:300].contiguous())]
    loss = losses[0] * losses[1]
    loss.backward()
    return loss.detach()


def scored_together(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    loss = net(batches[0]) + net(batches[1])
    loss.backward()
    return loss.detach()


def scored_one_by_one(net: Callable[..., Any], batches: list[torch.Tensor]) -> torch.Tensor:
    losses = [net(batch) for batch in batches[:1]]
    losses[0].backward()
    losses.append(net(batches[1]))
    losses[1].backward()
    return torch.stack([loss.detach() for loss in losses])


def twins(loop: Loop) -> tuple[nn.Module, nn.Module, list[torch.Tensor], int]:
    """Return a model, its twin, batches, and the peak of a step in eager PyTorch."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Encoder()
    mine = copy.deepcopy(eager)
    batches = [torch.randn(512, 48) for _ in range(4)]
    peak = measure_peak(lambda: loop(eager, batches)).peak_bytes
    eager.zero_grad()
    return mine, eager, batches, peak


def compiled(model: nn.Module, budget: int, **options: Any) -> Callable[..., Any]:
    backend = PacklightBackend(budget, rehearse=False, progress=False, **options)
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("loop", "share"),
    [(contrast, 0.6), (triplet, 0.5), (oldest_first, 0.5), (accumulated, 0.7),
     (with_a_look_before, 0.6), (of_two_lengths, 0.6)],
)
def test_a_loop_keeps_to_its_budget_from_the_first_step_on(loop: Loop, share: float) -> None:
    """The first step is measured when its graphs are there, the last when its path is planned."""
    mine, eager, batches, peak = twins(loop)
    budget = int(share * peak)
    net = compiled(mine, budget)
    theirs = torch.optim.SGD(eager.parameters(), 0.1)
    optimizer = torch.optim.SGD(mine.parameters(), 0.1)
    for number in range(4):
        torch.manual_seed(number)
        expected = loop(eager, batches)
        theirs.step()
        theirs.zero_grad()
        torch.manual_seed(number)
        if number in (1, 3):
            measured = measure_peak(lambda: loop(net, batches))
            assert measured.peak_bytes <= budget
            loss = measured.result
        else:
            loss = loop(net, batches)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss, expected), number
    for ours, other in zip(mine.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_a_plan_for_one_forward_gives_way_to_a_second_one() -> None:
    """One forward alone runs as planned; when a second comes, the first lets go of what it kept."""
    mine, eager, batches, _ = twins(contrast)
    one = measure_peak(lambda: eager(batches[0]).square().mean().backward()).peak_bytes
    net = compiled(mine, one)

    def alone() -> torch.Tensor:
        loss = net(batches[0]).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(2):
        alone()
        mine.zero_grad()
    eager.zero_grad()
    torch.manual_seed(1)
    expected = contrast(eager, batches)
    torch.manual_seed(1)
    measured = measure_peak(lambda: contrast(net, batches))
    assert torch.equal(measured.result, expected)
    assert measured.peak_bytes <= one
    for ours, other in zip(mine.parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None and other.grad is not None
        assert torch.equal(ours.grad, other.grad)


def smallest_bytes(model: nn.Module, batch: torch.Tensor) -> int:
    """Return the smallest budget of one call, as an error names it."""
    with pytest.raises(InfeasibleBudgetError) as caught, plain_errors():
        compiled(model, 1)(batch)
    torch._dynamo.reset()
    return caught.value.smallest_bytes


@pytest.mark.parametrize(
    ("loop", "what"),
    [(scored_together, "kept by others"), (scored_one_by_one, "gradients of earlier backwards")],
)
def test_what_does_not_fit_beside_the_rest_of_a_loop_is_refused(loop: Loop, what: str) -> None:
    torch.manual_seed(0)
    model, batches = Scored(), [torch.randn(512, 48) for _ in range(2)]
    torch._dynamo.reset()
    # A few bytes for what Python makes of the losses.
    net = compiled(model, smallest_bytes(model, batches[0]) + 64)
    net(batches[0]).backward()
    model.zero_grad()
    with pytest.raises(InfeasibleBudgetError, match=what) as refused:
        loop(net, batches)
    assert refused.value.smallest_bytes > refused.value.budget_bytes


def test_a_forward_that_transfers_runs_beside_another_one_where_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Scored(), [torch.randn(512, 48) for _ in range(2)]
    torch._dynamo.reset()
    backend = PacklightBackend(
        int(0.8 * smallest_bytes(model, batches[0])), progress=False, offload_directory=tmp_path
    )
    net = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    net(batches[0]).backward()
    model.zero_grad()
    plan = backend.compilations[-1].plan
    assert plan.lane_seconds > 0
    backend.budget_bytes = plan.peak_bytes
    message = "forward 2 before a backward"
    with plain_errors(), pytest.raises(InfeasibleBudgetError, match=message) as refused:
        scored_together(net, batches)
    backend.budget_bytes = refused.value.smallest_bytes
    del refused
    model.zero_grad()
    measured = measure_peak(lambda: scored_together(net, batches))
    assert plan.peak_bytes < measured.peak_bytes <= backend.budget_bytes


def test_hooks_on_what_autograd_saves_change_no_bit_or_are_refused() -> None:
    """`save_on_cpu` saves the same memory on a CPU; what copies is named before it is wrong."""
    torch.manual_seed(0)
    eager = Scored()
    model, batch = copy.deepcopy(eager), torch.randn(64, 48)
    torch._dynamo.reset()
    net = compiled(model, 2**24)
    for forward in (eager, net):
        torch.manual_seed(1)
        with torch.autograd.graph.save_on_cpu(pin_memory=False):
            loss = forward(batch)
        loss.backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = net(batch)
    with pytest.raises(UnsupportedModelError, match="hooks that copy what autograd saves"):
        loss.backward()


@pytest.mark.parametrize(
    "name", ["chain-0", "residual-0", "transformer-0", "u-shape-0", "dag-0", "towers-0"]
)
def test_what_a_run_has_kept_it_can_let_go_of(name: str) -> None:
    """The forward stays, nothing else is needed than what was kept, and less of it."""
    graph = graphs()[name]
    plain = order_of(graph, plain_schedule(graph))
    kept = live_after_forward(graph, plain_schedule(graph)) | graph.resident
    shrunk = with_smaller_backward(graph, plain, keeping_little(graph), kept)
    assert shrunk is not None and shrunk[0] == plain[0]
    schedule = piece_schedule(graph, shrunk)
    left = live_after_forward(graph, schedule)
    assert left <= kept
    sizes = [sum(graph.buffers[b].bytes for b in held - graph.resident) for held in (left, kept)]
    assert sizes[0] <= sizes[1]
    assert backward_peak_bytes(graph, schedule) <= simulate(graph, schedule).peak_bytes
