"""Results as Markdown tables. Nothing here is measured; nothing is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.common import (
    mebibytes,
    median_and_quartiles,
    models_of,
    of_model,
    percent_off,
    ratio_or_reason,
    table,
)
from benchmarks.peers.duels import Duel, duels_of, reason_for
from benchmarks.peers.front import best_within
from benchmarks.peers.ours import ALL_ROW, EXACT_ROW
from benchmarks.peers.records import EAGER, HALF, Record, Rematch
from benchmarks.peers.rivals import CHECKPOINT, EXACT, PER_BLOCK, SUMS

Reasons = dict[str, dict[str, str]]
Rematches = Sequence[Rematch]


def eager_of(records: list[Record]) -> Record:
    """Return eager's record among one model's."""
    return next(r for r in records if r.tool == EAGER)


def rivals_of(records: list[Record]) -> list[Record]:
    """Return what is neither eager nor Packlight."""
    return [r for r in records if r.tool != EAGER and not r.is_ours]


def ours_of(records: list[Record]) -> list[Record]:
    """Return Packlight's cells, row by row, the largest budget first."""
    rows = list(dict.fromkeys(r.tool for r in records if r.is_ours))
    cells = [r for r in records if r.is_ours]
    return sorted(cells, key=lambda r: (rows.index(r.tool), -(r.budget_bytes or 0)))


def smallest(records: Iterable[Record]) -> Record | None:
    """Return the timed cell with the smallest peak, of equal ones the fastest; None if none is."""
    timed = [r for r in records if r.was_timed]
    return min(timed, key=lambda r: (r.peak_bytes, r.ratio), default=None)


# -- cells of tables


def at(record: Record | None) -> str:
    """Return "peak MiB at ratio x"."""
    if record is None or not record.was_timed:
        return "-"
    return f"{mebibytes(record.peak_bytes)} at {record.ratio:.2f}x"


def bits(record: Record) -> str:
    """Return whether the first step leaves what eager's does, and what differs."""
    if record.same_bits is None:
        return "-"
    different = [name for name, same in record.same_bits.items() if not same]
    if not different:
        return "yes"
    return f"no: {', '.join(different)}; update off by {record.update_error or 0:.0e}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


# -- one model


def duel_table(records: list[Record], rematches: Rematches = ()) -> list[str]:
    """Return one model's rivals, each beside Packlight at that rival's peak."""
    rows = []
    for duel in duels_of(records, rematches):
        ours = duel.ours
        rows.append([
            duel.rival.name, duel.rival.changes, mebibytes(duel.rival.peak_bytes),
            ratio_or_reason(duel.rival), bits(duel.rival), _seconds(duel.rival.prepare_seconds),
            "-" if duel.exact is None else f"{duel.exact.ratio:.3f}",
            _absence(duel) if ours is None else mebibytes(ours.peak_bytes), ratio_or_reason(ours),
            "-" if ours is None else ours.tool.removeprefix("Packlight, "), _side_by_side(duel),
            duel.verdict,
        ])
    for rival in rivals_of(records):
        if not rival.was_timed:
            rows.append([rival.name, rival.changes, "failed", ratio_or_reason(rival), *["-"] * 8])
    header = ["rival", "changes", "its peak, MiB", "its time", "eager's bits", "first step, s",
              "Packlight exact there", "Packlight's peak, MiB", "Packlight's time", "as",
              "ours over theirs, side by side", "better"]
    return table(header, rows, right_from=2)


def _side_by_side(duel: Duel) -> str:
    if duel.rematch is None:
        return "-"
    return median_and_quartiles(duel.rematch.ratio_median, duel.rematch.ratio_quartiles)


def _absence(duel: Duel) -> str:
    if duel.smallest_bytes is None:
        return "nothing that changes as little"
    return f"not below {mebibytes(duel.smallest_bytes)}"


def plan_table(records: list[Record]) -> list[str]:
    """Return one model's Packlight cells: what was predicted beside what was measured."""
    rows = []
    for record in ours_of(records):
        is_over = (record.peak_bytes or 0) > (record.budget_bytes or 0)
        rows.append([
            record.tool.removeprefix("Packlight, "), record.setting, record.changes,
            (", ".join(record.moves) or "-") + (f" (as {record.same_as})" * bool(record.same_as)),
            mebibytes(record.budget_bytes),
            mebibytes(record.peak_bytes) + " **over**" * is_over,
            percent_off(record.predicted_peak_bytes, record.peak_bytes), ratio_or_reason(record),
            percent_off(record.predicted_seconds, record.seconds_median),
            _seconds(record.prepare_seconds), bits(record),
        ])
    header = ["Packlight", "budget", "changes", "moves", "MiB", "measured peak, MiB",
              "predicted peak off by", "time", "predicted time off by", "fit, s", "eager's bits"]
    return table(header, rows, right_from=4)


# -- all models


def smallest_table(records: list[Record]) -> list[str]:
    """Return how small each model gets: with eager's bits, with other sums, and with anything."""
    kinds: list[tuple[str, Callable[[Record], bool]]] = [
        ("eager's bits", lambda r: r.changes == EXACT),
        ("order of sums", lambda r: r.changes in (EXACT, SUMS)),
        ("anything", lambda r: True),
    ]
    rows = []
    for model in models_of(records):
        mine = of_model(records, model)
        for kind, is_allowed in kinds:
            rival = smallest(r for r in rivals_of(mine) if is_allowed(r))
            ours = smallest(r for r in ours_of(mine) if is_allowed(r))
            share = "-"
            if rival is not None and ours is not None:
                share = f"{(ours.peak_bytes or 0) / (rival.peak_bytes or 1):.2f}"
            rows.append([
                model, kind, mebibytes(eager_of(mine).peak_bytes),
                "-" if rival is None else rival.name, at(rival),
                "-" if ours is None else ours.name, at(ours), share,
            ])
    header = ["model", "may change", "eager, MiB", "smallest rival", "MiB", "smallest Packlight",
              "MiB", "ours over theirs"]
    return table(header, rows, right_from=2)


def lost_table(
    records: list[Record], reasons: Reasons, rematches: Rematches = ()
) -> list[str]:
    """Return all cells in which a rival wins at its own peak, with the reason."""
    rows = []
    for model in models_of(records):
        for duel in duels_of(of_model(records, model), rematches):
            if duel.is_lost:
                ours = f"not below {mebibytes(duel.smallest_bytes)}"
                rows.append([
                    model, duel.rival.name, duel.rival.changes, at(duel.rival),
                    ours if duel.ours is None else at(duel.ours), _side_by_side(duel),
                    reason_for(reasons, duel.rival),
                ])
    header = ["model", "rival", "changes", "its MiB", "Packlight there",
              "ours over theirs, side by side", "why"]
    return table(header, rows, right_from=len(header)) if rows else ["None."]


def duel_counts(records: list[Record], rematches: Rematches = ()) -> str:
    """Return how many duels there were, and how they ended."""
    duels = [
        d for model in models_of(records) for d in duels_of(of_model(records, model), rematches)
    ]
    again = [d for d in duels if d.rematch is not None]
    lost = [d for d in duels if d.is_lost]
    close = [d for d in duels if not d.is_lost and d.is_within_spread]
    return (
        f"{len(duels)} rivals ran; {len(lost)} win at their own peak, {len(close)} are within the "
        f"spread, Packlight is faster beside {len(duels) - len(lost) - len(close)}. "
        f"{len(again)} of them were timed again side by side, which decides."
    )


def wall_table(records: list[Record]) -> list[str]:
    """Return how long the benchmark of each model took."""
    rows = [
        [model, str(len(mine)), f"{sum(r.cell_seconds for r in mine) / 60:.1f}"]
        for model in models_of(records)
        for mine in [of_model(records, model)]
    ]
    return table(["model", "cells", "minutes"], rows)


def summary_table(records: list[Record]) -> list[str]:
    """Return the short table of the project's README: each model at a few points."""
    rows = []
    for model in models_of(records):
        mine = of_model(records, model)
        exact = [r for r in mine if r.tool == EXACT_ROW.tool]
        sums = [*exact, *(r for r in mine if r.tool == ALL_ROW.tool)]
        per_block = next((r for r in mine if (r.tool, r.setting) == (CHECKPOINT, PER_BLOCK)), None)
        half = next((r for r in sums if r.setting == HALF and r.was_timed), None)
        there = None
        if per_block is not None and per_block.was_timed:
            there = best_within(exact, per_block.peak_bytes or 0)
        rows.append([
            eager_of(mine).title, mebibytes(eager_of(mine).peak_bytes), at(half), at(per_block),
            at(there), at(smallest(r for r in rivals_of(mine) if r.changes == EXACT)),
            at(smallest(exact)), at(smallest(sums)), at(smallest(r for r in mine if r.is_ours)),
        ])
    header = ["step", "eager, MiB", "half of it", "checkpoint per block", "Packlight there",
              "smallest rival", "smallest, exact", "all moves", "8 bits, bf16 or disk"]
    return table(header, rows)


def budget_lines(records: Sequence[Record]) -> list[str]:
    """Return the sentence on budgets kept, and a list of those that were not."""
    ran = [r for r in records if r.is_ours and r.budget_bytes and r.peak_bytes is not None]
    broken = [r for r in ran if (r.peak_bytes or 0) > (r.budget_bytes or 0)]
    lines = [f"{len(ran) - len(broken)} of {len(ran)} Packlight cells kept to their budget."]
    return lines + [
        f"- {r.model}, {r.name}: {mebibytes(r.peak_bytes)} of {mebibytes(r.budget_bytes)} MiB"
        for r in broken
    ]
