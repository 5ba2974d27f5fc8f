"""The table of README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common import mebibytes, quartiles, table


def report(records: Sequence[Any]) -> list[str]:
    """Return one row a mode: peak, the prediction, seconds beside DDP's of the same round, bits.

    Seconds are left out where the machine had other work than its cores can do.
    """
    if not records:
        return ["nothing was measured"]
    told = records[-1].provenance
    is_busy = told["load_at_start"] > told["cores"]
    base = {r.round: r.step_seconds for r in records if r.mode == records[0].mode}
    rows = []
    for mode in dict.fromkeys(record.mode for record in records):
        mine = [record for record in records if record.mode == mode]
        latest = mine[-1]
        ratios = [r.step_seconds / base[r.round] for r in mine if r.round in base]
        predicted = [
            r.predicted_seconds / r.step_seconds for r in mine if r.predicted_seconds is not None
        ]
        rows.append([
            mode, mebibytes(max(r.peak_bytes for r in mine)),
            "" if latest.predicted_bytes is None else mebibytes(latest.predicted_bytes),
            *(["", "", ""] if is_busy else [
                f"{statistics.median(r.step_seconds for r in mine) * 1e3:.0f}", _ratio(ratios),
                f"{statistics.median(predicted):.2f}" if predicted else "",
            ]),
            f"{latest.num_equal} of {latest.num_parameters}",
        ])
    return [
        *table(
            ["", "peak, MiB", "predicted", "ms a step", f"of {records[0].mode}'s",
             "predicted time of measured", f"parameters with {records[0].mode}'s bits"],
            rows,
        ),
        "",
        f"{len(base)} rounds of {told['cores']} cores ({told['hardware']}), torch "
        f"{told['versions']['torch']}, load {told['load_at_start']} at the start; "
        f"`{told['command']}`." + (" Times are left out: the machine had other work." * is_busy),
    ]


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    spread = quartiles(ratios)
    words = "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
    return f"{statistics.median(ratios):.2f}{words}"
