"""The torch.compile backend in the situations that training loops bring about."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packlight.backend import PacklightBackend, backend_from_options
from packlight.capture.dynamo import plain_errors
from packlight.errors import BudgetFormatError, GraphBreakError, OptionError
from packlight.planner import Planner
from packlight.step import Action


def tight(graph: Any) -> int:
    """The smallest budget that a graph can be planned for."""
    return Planner(graph).smallest_plan().peak_bytes


def compiled(function: Any, **options: Any) -> tuple[Callable[..., Any], PacklightBackend]:
    """Return a module or function compiled for the smallest budget, and its backend."""
    torch._dynamo.reset()
    backend = PacklightBackend(choose_budget=tight, progress=False)
    return torch.compile(function, backend=backend, **{"fullgraph": True, **options}), backend


class Net(nn.Module):
    """Batch norm, dropout, a tied, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(16) for _ in range(4)])
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.body[1].weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer, norm in zip(self.body, self.norms, strict=True):
            x = x + F.dropout(F.relu(norm(layer(x))), 0.2, self.training)
        return self.head(x)


def twins() -> tuple[Net, Net, torch.Tensor]:
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net), torch.randint(0, 20, (32,))


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, tokens)


def assert_equal_models(mine: nn.Module, eager: nn.Module) -> None:
    for (name, a), b in zip(mine.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(mine.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_tied_frozen_and_unused_parameters_get_eager_gradients() -> None:
    eager, mine, tokens = twins()
    call, _ = compiled(mine)
    for net, forward in ((eager, eager), (mine, call)):
        torch.manual_seed(5)
        for _ in range(2):
            net.zero_grad()
            loss_of(forward(tokens), tokens).backward()
    assert_equal_models(mine, eager)
    assert mine.unused.grad is None and mine.body[1].weight.grad is None


def test_several_forwards_before_their_backwards() -> None:
    eager, mine, tokens = twins()
    call, _ = compiled(mine)
    for net, forward in ((eager, eager), (mine, call)):
        torch.manual_seed(5)
        first = loss_of(forward(tokens), tokens)
        second = loss_of(forward(tokens.flip(0)), tokens)
        # One backward each: eager would add up a tied weight's gradients of both in another order.
        second.backward()
        (2 * first).backward()
        assert net.norms[0].num_batches_tracked == 2
    assert_equal_models(mine, eager)


def test_gradients_accumulate_over_backwards() -> None:
    eager, mine, tokens = twins()
    call, _ = compiled(mine)
    for forward in (eager, call):
        torch.manual_seed(5)
        for _ in range(3):
            loss_of(forward(tokens), tokens).backward()
    assert_equal_models(mine, eager)


def test_a_retained_graph_can_run_backward_again() -> None:
    eager, mine, tokens = twins()
    call, _ = compiled(mine)
    for forward in (eager, call):
        torch.manual_seed(5)
        loss = loss_of(forward(tokens), tokens)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal_models(mine, eager)


def test_evaluation_and_mode_switches() -> None:
    eager, mine, tokens = twins()
    call, _ = compiled(mine)
    for net, forward in ((eager, eager), (mine, call)):
        torch.manual_seed(5)
        loss_of(forward(tokens), tokens).backward()
        net.eval()
        with torch.no_grad():
            net.found = forward(tokens)
        net.train()
        loss_of(forward(tokens), tokens).backward()
    assert torch.equal(mine.found, eager.found)
    assert_equal_models(mine, eager)


def test_new_batch_shapes_are_planned_anew_and_cached() -> None:
    eager, mine, tokens = twins()
    call, backend = compiled(mine, dynamic=None)
    sizes = (32, 16, 24, 16, 32)
    for forward in (eager, call):
        torch.manual_seed(5)
        for size in sizes:
            loss_of(forward(tokens[:size]), tokens[:size]).backward()
    assert_equal_models(mine, eager)
    assert len(backend.compilations) == len(set(sizes))


def test_outputs_besides_the_loss() -> None:
    eager, mine, tokens = twins()

    def outputs(net: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        logits = net(tokens)
        return loss_of(logits, tokens), {"logits": logits, "view": logits[:2].t(), "count": 3}

    call, _ = compiled(outputs)
    results = []
    for net, forward in ((eager, outputs), (mine, call)):
        torch.manual_seed(5)
        loss, more = forward(net, tokens)
        (loss + more["view"].sum()).backward()
        results.append(more)
    assert torch.equal(results[0]["logits"], results[1]["logits"]) and results[1]["count"] == 3
    assert_equal_models(mine, eager)


def test_dropout_masks_are_replayed_when_recomputed() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(16) for m in (nn.Linear(64, 64), nn.Dropout(0.5), nn.GELU())]
    eager = nn.Sequential(*layers)
    mine = copy.deepcopy(eager)
    call, backend = compiled(mine)
    x = torch.randn(2048, 64)
    for forward in (eager, call):
        torch.manual_seed(5)
        forward(x).square().mean().backward()
    assert_equal_models(mine, eager)
    compilation = backend.compilations[-1]
    counts = compilation.plan.schedule.run_counts()
    replayed = [o for o in compilation.graph.operations if o.is_random and counts[o.id] > 1]
    assert replayed, "the tightest budget recomputes dropout"


def test_batch_statistics_are_updated_once_although_batch_norm_runs_again() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(16) for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU())]
    eager = nn.Sequential(*layers)
    mine = copy.deepcopy(eager)
    call, backend = compiled(mine)
    x = torch.randn(2048, 32)
    for forward in (eager, call):
        forward(x).square().mean().backward()
    assert_equal_models(mine, eager)
    compilation = backend.compilations[-1]
    counts = compilation.plan.schedule.run_counts()
    again = [o for o in compilation.graph.operations if "batch_norm" in o.name and counts[o.id] > 1]
    assert again, "the tightest budget recomputes batch norm"


def test_in_place_reuse_shows_in_the_schedule_and_not_in_the_result() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)

    def chain(x: torch.Tensor) -> torch.Tensor:
        y = x * 2.0
        for _ in range(4):
            y = torch.tanh(y + 1.0)
        return y.sum()

    backend = PacklightBackend(progress=False)
    torch._dynamo.reset()
    call = torch.compile(chain, backend=backend, fullgraph=True)
    gradients = []
    for function in (chain, call):
        x.grad = None
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    instructions = backend.compilations[-1].plan.schedule.instructions
    assert any(i.overwrite for i in instructions if i.action is Action.RUN)


def test_a_graph_break_names_file_line_and_cause() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        print("breaks here")
        return (y * y).sum()

    backend = PacklightBackend(progress=False)
    torch._dynamo.reset()
    with pytest.raises(GraphBreakError, match="test_backend.py") as caught, plain_errors():
        torch.compile(broken, backend=backend, fullgraph=True)(torch.ones(3, requires_grad=True))
    assert caught.value.line == broken.__code__.co_firstlineno + 2
    assert "print" in str(caught.value)


def test_double_backward_is_refused() -> None:
    call, _ = compiled(lambda x: (x**3).sum())
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_complex_parameters_train() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8, dtype=torch.complex64, requires_grad=True)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).abs().square().sum()

    call, _ = compiled(energy)
    gradients = []
    for function in (energy, call):
        x.grad = None
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("budget", ["0", "abc", "12 parsecs", 0.5, -1, True, "0.5"])
def test_budgets_that_are_no_number_of_bytes_are_refused(budget: Any) -> None:
    with pytest.raises(BudgetFormatError, match="not a memory budget"):
        backend_from_options({"budget": budget})


def test_unknown_options_and_techniques_are_named() -> None:
    with pytest.raises(OptionError, match="'bugdet'.*\n.*'budget'"):
        backend_from_options({"bugdet": "1MiB"})
    with pytest.raises(OptionError, match="'int4'"):
        backend_from_options({"allow": ("int4",)})


def test_each_combination_of_in_place_overloads_was_checked_for_equal_bits() -> None:
    from packlight.costs.measure import in_place_call, observe_call

    x = torch.randn(64, 32)
    calls = [
        (torch.ops.aten.mul.Scalar, (x, 2.0)),
        (torch.ops.aten.gelu.default, (x,)),
        (torch.ops.aten.gelu_backward.default, (x, x.clone())),
        (torch.ops.aten._log_softmax.default, (x, 1, False)),
        (torch.ops.aten.threshold_backward.default, (x, x.clone(), 0)),
    ]
    for (target, arguments), _ in itertools.product(calls, range(1)):
        facts = observe_call(target, arguments, {})
        assert facts.in_place is not None, target
        found = in_place_call(target, facts.in_place, len(arguments))
        assert found is not None
        expected = target(*arguments)
        real = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        overload, keyword = found
        result = overload(*real, **({keyword: real[facts.in_place]} if keyword else {}))
        assert result is real[facts.in_place] and torch.equal(result, expected)
    mm = observe_call(torch.ops.aten.mm.default, (torch.randn(8, 8), torch.randn(8, 8)), {})
    assert mm.in_place is None
