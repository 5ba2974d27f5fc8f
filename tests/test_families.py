"""A few families at several budgets: peaks are kept and predicted, no bit differs from eager.

All of them, at five budgets each: `make bench-zoo`; another slice of that: test_zoo.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import packlight
from benchmarks.zoo.outcome import observe, traced
from packlight.backend import PacklightBackend
from packlight.errors import InfeasibleBudgetError
from packlight.planner import smallest_plan
from packlight.step import StepGraph
from tests.models import make

FRACTIONS = (0.0, 0.35, 0.7, 1.0)  # of eager's peak; 0 for the smallest feasible


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plans for several budgets are comparable only if they are made with the same times."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


@contextmanager
def eager_on_the_captured_branch(family: str) -> Iterator[None]:
    """Let eager PyTorch take the branch that a model's own code takes when it is captured.

    Llama asks transformers whether it is being traced and then repeats keys and values for grouped
    queries instead of passing enable_gqa, which gives other last bits in eager PyTorch, too.
    """
    if family == "llama":
        with (
            mock.patch(
                "transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *a, **k: False
            ),
            mock.patch("transformers.masking_utils.is_tracing", lambda *a, **k: True),
        ):
            yield
    else:
        yield


@pytest.mark.parametrize("family", ["mlp", "unet", "gpt2", "llama", "lstm"])
def test_budgets_are_kept_predicted_and_exact(family: str) -> None:
    model, batch, loss_fn = make(family)
    with eager_on_the_captured_branch(family):
        eager = observe(model, batch, loss_fn)
    if family == "lstm":
        # Traced, nn.LSTM runs its time steps and not one fused oneDNN call, which rounds and drops
        # out differently: schedules are compared with the captured graph run as it is.
        eager = observe(model, batch, traced(loss_fn))
    seconds: list[float] = []
    smallest = 0
    for fraction in FRACTIONS:
        torch._dynamo.reset()
        budget = max(smallest, int(eager.peak_bytes * fraction))

        def choose(graph: StepGraph, budget: int = budget) -> int:
            return budget or smallest_plan(graph).peak_bytes

        backend = PacklightBackend(choose_budget=choose, rehearse=False, progress=False)
        call = torch.compile(loss_fn, backend=backend, fullgraph=True, dynamic=False)
        mine = observe(model, batch, call)
        plan = backend.compilations[-1].plan
        assert plan.budget_bytes is not None
        smallest = smallest or plan.budget_bytes
        assert mine.peak_bytes <= plan.budget_bytes, fraction
        assert abs(mine.peak_bytes - plan.peak_bytes) <= 0.005 * mine.peak_bytes, fraction
        assert mine.differences(eager) == [], fraction
        seconds.append(plan.seconds)
    assert seconds == sorted(seconds, reverse=True), "a larger budget is never slower"


@pytest.mark.parametrize("family", ["unet", "mobilenet", "gpt2", "densenet"])
def test_the_unplanned_step_does_not_peak_above_eager(family: str) -> None:
    model, batch, loss_fn = make(family)
    eager = observe(model, batch, loss_fn)
    backend = PacklightBackend(rehearse=False, progress=False)
    call = torch.compile(loss_fn, backend=backend, fullgraph=True, dynamic=False)
    mine = observe(model, batch, call)
    assert mine.peak_bytes <= eager.peak_bytes


def test_a_budget_below_the_smallest_names_it_and_that_one_works() -> None:
    model, batch, loss_fn = make("unet")
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(model, loss_fn, None, batch, "1MiB", progress=False)
    smallest = caught.value.smallest_bytes
    plan = packlight.plan(model, loss_fn, None, batch, smallest, progress=False)
    assert plan.peak_bytes <= smallest
