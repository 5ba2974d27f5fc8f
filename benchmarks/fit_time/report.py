"""Tables out of the lines: seconds beside the baseline's, and where they go."""

from __future__ import annotations

import statistics

from benchmarks.common import table
from benchmarks.fit_time.cases import CASES
from benchmarks.fit_time.records import BASELINE, COLD, MINE, SAVED, WARM, Record
from benchmarks.fit_time.where import GARBAGE


def report(records: list[Record]) -> list[str]:
    """Return the tables' lines."""
    lines: list[str] = []
    for name, case in CASES.items():
        mine = [r for r in records if r.case == name and r.error is None]
        if not mine:
            continue
        lines += [f"### {case.title}", "", *_totals(mine), ""]
        for side in (BASELINE, MINE):
            by_state = {
                state: found
                for state in (COLD, WARM, SAVED)
                if (found := [r for r in mine if (r.side, r.state) == (side, state)])
            }
            if by_state:
                lines += [f"Where processor seconds go, {side}:", "", *_parts(by_state), ""]
    return lines[:-1]


def _totals(records: list[Record]) -> list[str]:
    rows = []
    for side in (BASELINE, MINE):
        for state in (COLD, WARM, SAVED):
            found = [r for r in records if (r.side, r.state) == (side, state)]
            if found:
                rows.append([
                    side, state,
                    found[-1].moves or f"refused; {found[-1].smallest_bytes} bytes would do",
                    *_beside_baseline(records, found, "seconds"),
                    *_beside_baseline(records, found, "cpu_seconds"),
                ])
    return table(
        ["", "in the cache", "moves", "s", "of baseline's", "processor s", "of baseline's"],
        rows, right_from=3,
    )


def _beside_baseline(records: list[Record], found: list[Record], name: str) -> list[str]:
    """Return a median and its ratio; a way that is kept is compared with fits that kept nothing."""
    state = COLD if found[0].state == SAVED else found[0].state
    beside = [r for r in records if (r.side, r.state) == (BASELINE, state)]
    mine = _median(found, name)
    return [f"{mine:.1f}", f"{mine / _median(beside, name):.3f}" if beside else "-"]


def _parts(by_state: dict[str, list[Record]]) -> list[str]:
    names = {name for records in by_state.values() for r in records for name in r.parts}
    seconds = {
        name: [
            statistics.median(r.parts.get(name, 0.0) for r in records)
            for records in by_state.values()
        ]
        for name in names
    }
    order = sorted(names, key=lambda name: (name == GARBAGE, -max(seconds[name])))
    rows = [[name, *(f"{value:.2f}" for value in seconds[name])] for name in order]
    return table(["part", *by_state], rows)


def _median(records: list[Record], name: str) -> float:
    return statistics.median(getattr(r, name) for r in records)
