"""What ranks know of calls, as it holds on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from packlight.costs.measure import CallFacts
from packlight.costs.profiler import Known
from packlight.errors import RankMismatchError


def slowest(everybody: Sequence[Known]) -> Known:
    """Return what holds on all ranks: the longest times, the largest workspaces.

    Raises:
        RankMismatchError: a call returns other memory on one rank than on another.
    """
    calls: dict[str, CallFacts] = {}
    others: dict[str, float] = {}
    for rank, known in enumerate(everybody):
        for signature, facts in known.calls.items():
            before = calls.setdefault(signature, facts)
            if before is not facts:
                calls[signature] = _merged(signature, before, facts, rank)
        for name, seconds in known.others.items():
            others[name] = max(seconds, others.get(name, 0.0))
    return Known(calls, others)


def _merged(signature: str, one: CallFacts, another: CallFacts, rank: int) -> CallFacts:
    if (one.outputs, one.missing) != (another.outputs, another.missing):
        raise RankMismatchError(
            f"what {signature} returns", rank, one.outputs, another.outputs,
            "ranks need processors with the same kernels",
        )
    in_step = [f.in_step_seconds for f in (one, another) if f.in_step_seconds is not None]
    return replace(
        one,
        seconds=max(one.seconds, another.seconds),
        workspace_bytes=max(one.workspace_bytes, another.workspace_bytes),
        in_place=one.in_place if one.in_place == another.in_place else None,
        in_step_seconds=max(in_step, default=None),
    )
