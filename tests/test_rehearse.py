"""Times measured inside the step are of the operations, each run once, and leave no trace."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import packlight
from packlight import backend as backend_module
from packlight.backend import PacklightBackend
from packlight.costs.measure import CallFacts
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError
from packlight.planner import smallest_plan
from packlight.search import plan_way
from packlight.search.rehearse import ENOUGH_TIMES, NUM_REHEARSALS, _Calls, in_known_terms
from packlight.step import OperationKind, Schedule
from tests.models import make


def test_of_equal_calls_every_run_of_a_few_is_timed_and_no_trace_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout())]
    model, x = nn.Sequential(*layers), torch.randn(256, 32)
    timed: Counter[int] = Counter()
    schedules: list[Schedule] = []
    note, emit = _Calls.note, backend_module.emit

    def counting_note(calls: _Calls, operation: int, seconds: float) -> None:
        timed[operation] += 1
        note(calls, operation, seconds)

    def noting_emit(step: Any, schedule: Schedule, cuts: Any) -> Any:
        schedules.append(schedule)
        return emit(step, schedule, cuts)

    monkeypatch.setattr(_Calls, "note", counting_note)
    monkeypatch.setattr(backend_module, "emit", noting_emit)
    torch._dynamo.reset()
    backend = PacklightBackend(
        choose_budget=lambda graph: smallest_plan(graph).peak_bytes, progress=False
    )
    states = {name: value.clone() for name, value in model.named_buffers()}
    generator = torch.get_rng_state()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    backend.is_dry_run = True
    with pytest.raises(backend_module.StepCaptured):
        compiled(x)

    graph = backend.compilations[-1].graph
    counts = schedules[0].run_counts()
    equal: dict[Any, list[int]] = {}
    for operation in graph.operations:
        if operation.kind is OperationKind.COMPUTE:
            sizes = [[graph.buffers[b].bytes for b in some] for some in
                     (operation.reads, operation.creates)]
            equal.setdefault(f"{operation.name} {sizes}", []).append(operation.id)
    assert max(map(len, equal.values())) >= 8, "there are equal layers"
    for operations in equal.values():
        seen = [o for o in operations if o in timed]
        assert seen, "one of them is timed"
        assert all(timed[o] == NUM_REHEARSALS * counts[o] for o in seen)
    linear = next(found for name, found in equal.items() if "addmm" in name)
    assert len(linear) == 8 and len(timed.keys() & linear) <= ENOUGH_TIMES
    assert len({graph.operations[o].seconds for o in linear}) == 1, "all have what some took"
    assert any(timed[o] > NUM_REHEARSALS for o in timed), "something is recomputed"
    assert all(torch.equal(value, states[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_the_way_that_fit_chooses_has_been_rehearsed_and_none_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    model, batch, loss_fn = make("gpt2", layers=3)
    optimizer = torch.optim.AdamW(model.parameters())
    plain = packlight.fit(model, loss_fn, optimizer, batch, progress=False)
    rehearsed: list[tuple[Any, Any]] = []
    way = plan_way.WayPlanner.way

    def noting_way(self: Any, choice: Any, *arguments: Any, **options: Any) -> Any:
        found = way(self, choice, *arguments, **options)
        if options.get("rehearses"):
            rehearsed.append((choice, found))
        return found

    monkeypatch.setattr(plan_way.WayPlanner, "way", noting_way)
    budget_bytes = int(0.5 * plain.peak_bytes)
    step = packlight.fit(model, loss_fn, optimizer, batch, budget_bytes, progress=False)
    assert any(found.parts is step.ready.parts for _, found in rehearsed)
    assert len({id(choice) for choice, _ in rehearsed}) == len(rehearsed)


def test_a_way_that_is_not_found_again_with_rehearsed_times_is_taken_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    way = plan_way.WayPlanner.way

    def unlucky_way(self: Any, *arguments: Any, rehearses: bool = False, **options: Any) -> Any:
        if rehearses:
            raise InfeasibleBudgetError(1, 2, "anywhere", [])
        return way(self, *arguments, **options)

    monkeypatch.setattr(plan_way.WayPlanner, "way", unlucky_way)
    step = packlight.fit(
        model, lambda m, b: m(b).square().mean(), optimizer, batch, "1MiB", progress=False
    )
    assert step.measured(batch).peak_bytes <= 2**20


def test_times_inside_the_step_are_estimated_from_the_operators_other_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    add, exp = torch.ops.aten.add.Tensor, torch.ops.aten.exp.default
    with FakeTensorMode():
        value = torch.empty(1000)
    with CallProfiler(progress=False) as profiler:
        assert not profiler.has_seen_steps
        alone = profiler.measure(add, (value, value), {}).seconds
        assert profiler.estimated_in_step(add, 2.0) == 2.0  # nothing is known
        profiler.note_in_step(add, (value, value), {}, 3 * alone)
        assert profiler.estimated_in_step(add, 2.0) == pytest.approx(6.0)
        # Another operator: as all calls together.
        assert profiler.estimated_in_step(exp, 2.0) == pytest.approx(6.0)


def test_calls_seen_before_tell_how_fast_the_machine_is_now() -> None:
    def step(*in_step_seconds: float | None) -> Any:
        facts = [CallFacts(1.0, 0, (), None, seconds) for seconds in in_step_seconds]
        return SimpleNamespace(facts=[None, *facts])

    # Half as fast as when the others were seen: a new call would have taken half the time then.
    found = in_known_terms(step(2.0, 1.0, None), {1: 4.0, 2: 2.0, 3: 3.0})
    assert found == pytest.approx({1: 2.0, 2: 1.0, 3: 1.5})
    # Most of the step is new: what little is known says nothing.
    assert in_known_terms(step(2.0, None), {1: 4.0, 2: 9.0}) == {1: 4.0, 2: 9.0}


class Attending(nn.Module):
    """Attention over and over: an operator that counts as random, with float results only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, heads, length, width) as it came."""
        for _ in range(2 * ENOUGH_TIMES):
            x = nn.functional.scaled_dot_product_attention(x, x, x).tanh()
        return x


def test_random_calls_that_run_again_are_rehearsed_though_equal_ones_are_left_out(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    x = torch.randn(4, 4, 64, 32, requires_grad=True)
    expected, = torch.autograd.grad(Attending()(x).sum(), x)
    torch._dynamo.reset()
    backend = PacklightBackend(
        choose_budget=lambda graph: smallest_plan(graph).peak_bytes, progress=False
    )
    loss = torch.compile(Attending(), backend=backend, fullgraph=True)(x).sum()
    found, = torch.autograd.grad(loss, x)
    compiled = backend.compilations[-1]
    again = compiled.graph.reruns(compiled.plan.schedule)
    assert any(compiled.graph.operations[o].is_random for o in again)
    assert torch.equal(found, expected)
