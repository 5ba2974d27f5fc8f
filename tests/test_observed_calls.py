"""What is observed of a call alone holds for that call inside a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packlight.capture.measure import observe_call
from packlight.capture.peak import measure_peak
from packlight.runtime.rng import generator_state, replay

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
