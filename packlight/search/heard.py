"""What an exchange between ranks costs: known from the link, never observed on one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from packlight.capture.read_joint import Measure
from packlight.costs.measure import CallFacts, OutputFacts
from packlight.ranks.collectives import ALL_GATHER, COLLECTIVES, REDUCE_SCATTER, silent
from packlight.ranks.exchange import ROW_EXCHANGES
from packlight.ranks.rows import RowMap
from packlight.step import Lane


def timing_collectives(measure: Measure, network: Lane | None) -> Measure:
    """Return a function that measures calls, and takes exchanges' seconds from the network.

    Args:
        measure: as `CallProfiler.measure`.
        network: the lane; None where there are no ranks.
    """

    def facts_of(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> CallFacts:
        if target not in COLLECTIVES or network is None:
            return measure(target, args, kwargs)
        if target in ROW_EXCHANGES:
            return _of_rows(measure, target, args, network)
        value: torch.Tensor = args[0]
        num_bytes = value.numel() * value.itemsize
        speed, result_bytes, workspace_bytes = network.reduce, num_bytes, 0
        if target is ALL_GATHER:
            speed, result_bytes = network.share, num_bytes * args[1]
        elif target is REDUCE_SCATTER:
            result_bytes, workspace_bytes = num_bytes // args[2], num_bytes
        assert speed is not None, "a network is measured before anything is planned"
        seconds = speed.seconds(max(num_bytes, result_bytes))
        result = OutputFacts(None, None, result_bytes)
        return CallFacts(seconds, workspace_bytes, (result,), None, in_step_seconds=seconds)

    return facts_of


def _of_rows(measure: Measure, target: Any, args: Any, network: Lane) -> CallFacts:
    """Return what it costs that ranks send rows to one another: the most of any rank."""
    with silent():
        facts = measure(target, args, {})
    x, dim, table = args[:3]
    rows = RowMap.decoded(table)
    num_rows = max(rows.most_received, rows.most_sent)
    row_bytes = x.itemsize * x.numel() // int(x.shape[dim])
    assert network.share is not None, "a network is measured before anything is planned"
    seconds = network.share.seconds(num_rows * row_bytes)
    return replace(facts, seconds=seconds, in_step_seconds=seconds)
