"""A few random loops; `python -m tests.fuzz` tries as many as there is time for."""

from __future__ import annotations

import pytest

from tests.fuzz.trial import Trial, drawn, outcome_of


@pytest.mark.parametrize("seed", [1003, 1007, 1009, 1012])
def test_random_loops_are_exact_within_budgets_and_raise_nothing_raw(seed: int) -> None:
    outcome = outcome_of(drawn(seed))
    assert not outcome.problem, (outcome.problem, drawn(seed))


def test_what_fails_while_it_is_traced_is_an_error_of_ours() -> None:
    """A parameter is read for the backward and then changed, which eager PyTorch refuses, too."""
    outcome = outcome_of(Trial(layers=("relu", "clamped"), loss="regularised"))
    assert "fails when it is traced" in outcome.said and not outcome.problem
