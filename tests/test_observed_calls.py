"""What is observed of a call alone holds for that call inside a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.costs.measure import observe_call
from packlight.costs.peak import measure_peak
from packlight.errors import InfeasibleBudgetError
from packlight.lower.rng import generator_state, replay
from tests.models import classify
from tests.oracles.eager_loop import assert_equal_losses, assert_same_bits, twins

aten = torch.ops.aten


@pytest.mark.parametrize(
    "target, arguments",
    [
        (aten.copy.default, lambda x: (x[:, :12], torch.ones(8, 12))),
        (aten.slice_scatter.default, lambda x: (x[:, :12], torch.ones(8, 6), 1, 0, 6)),
        (aten.select_scatter.default, lambda x: (x[1:5, :12], torch.ones(12), 0, 2)),
        (aten.diagonal_scatter.default, lambda x: (x[:8, :12], torch.ones(8))),
        (aten.mul.Tensor, lambda x: (x[:, :12], 2.0)),
    ],
)
def test_what_a_call_on_a_view_allocates_is_what_it_allocates_behind_any_storage(
    target: Any, arguments: Any
) -> None:
    for rows in (8, 20):
        args = arguments(torch.zeros(rows, 64)[:8])
        measured = measure_peak(lambda a=args: target(*a))
        facts = observe_call(target, args, {})
        assert facts.outputs[0].storage_bytes == measured.end_bytes
        assert facts.outputs[0].storage_bytes + facts.workspace_bytes >= measured.peak_bytes


@pytest.mark.parametrize(
    "target, args, kwargs",
    [
        (aten.randint.low, (0, 100, [20]), {}),
        (aten.rand.default, ([20],), {"dtype": torch.float64}),
        (aten.bernoulli.p, (torch.zeros(20), 0.5), {}),
    ],
)
def test_a_replayed_random_call_draws_the_same_and_leaves_the_generator(
    target: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    cpu = torch.device("cpu")
    if target is not aten.bernoulli.p:  # as it is captured
        kwargs = {**kwargs, "device": cpu, "pin_memory": False}
    state = generator_state(cpu)
    first = target(*args, **kwargs)
    torch.rand(3)
    now = generator_state(cpu)
    assert torch.equal(replay(state, cpu, target, *args, **kwargs), first)
    assert torch.equal(generator_state(cpu), now)


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_net_that_normalises_its_input_trains_like_eager(
    is_tight: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Batch norm's backward leaves out the gradient of the images, which its fake kernel returns.
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 8 * 8, 10))
    batch = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    mine, eager = twins(model, classify, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    options = {"moves": ("update-in-backward",), "progress": False}
    budget = None
    if is_tight:
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.plan(mine.model, classify, mine.optimizer, batch, 1, **options)
        budget = caught.value.smallest_bytes
    step = packlight.fit(mine.model, classify, mine.optimizer, batch, budget, **options)
    for _ in range(2):
        measured = step.measured(batch)
        assert_equal_losses([measured.loss], [eager.step(batch)])
        assert budget is None or measured.peak_bytes <= budget
    assert_same_bits(mine, eager)
