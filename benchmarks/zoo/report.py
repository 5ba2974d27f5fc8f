"""Writes the matrix from the JSON lines: `python -m benchmarks.zoo.report`.

It goes between markers in docs/zoo.md, every family of tests/zoo/families.py in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.common import ROOT, first_line, replace_between_markers, table
from benchmarks.zoo.records import (
    ALL,
    COMPILE,
    CONFIGS,
    EXACT,
    RESULTS,
    SMALLEST,
    Config,
    Record,
    read_records,
)

ByFamily = Mapping[str, list[Record]]


def main() -> None:
    """Regenerate the document."""
    from tests.zoo.families import BREAKING, FAMILIES, KNOWN

    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ is")
    arguments = parser.parse_args()
    records = read_records(arguments.results)
    if not records:
        raise SystemExit(f"{arguments.results}: no results; run python -m benchmarks.zoo first")
    kinds = {name: family.kind for name, family in FAMILIES.items()}
    lines = full_report(records, kinds, KNOWN, BREAKING)
    replace_between_markers(arguments.root / "docs" / "zoo.md", "zoo", lines)


def full_report(
    records: list[Record],
    kinds: Mapping[str, str],
    known: Mapping[str, str],
    breaking: Mapping[str, str],
) -> list[str]:
    """Return the lines of summary, matrix and failures.

    Args:
        records: of all families.
        kinds: of every family there is, measured or not.
        known: why some families fail.
        breaking: why some are no one graph.
    """
    found = {name: [r for r in records if r.family == name] for name in kinds}
    mine = [r for lines in found.values() for r in lines]
    lines = ["", *summary(found), "", conditions(mine), ""]
    for kind in dict.fromkeys(kinds.values()):
        of_kind = {name: found[name] for name, its in kinds.items() if its == kind}
        lines += [f"### {kind[:1].upper()}{kind[1:]}", "", *matrix(of_kind), ""]
    lines += ["## Where graphs break", "", *breaks(found, breaking), ""]
    lines += ["## What fails, and why", "", *failures(found, known), ""]
    return lines


def summary(found: ByFamily) -> list[str]:
    """Return what all cells come to."""
    records = [r for lines in found.values() for r in lines]
    measured = [r for r in records if r.error is None]
    compared = [r for r in measured if r.bits is not None]
    rounded = [r for r in measured if not r.is_exact and not r.draws]
    failing = {r.family for r in records if r.failure is not None}
    missing = [name for name, lines in found.items() if not lines]
    errors = [r.prediction_error for r in measured if r.prediction_error is not None]
    over = [r for r in measured if r.is_over_budget]
    kinds = ("eager", "traced", "unplanned", "other")
    bits = {whose: sum(r.bits == whose for r in compared) for whose in kinds}
    broken = {r.family for r in measured if r.num_pieces is not None}
    seconds = sum((r.capture_seconds or 0.0) + (r.plan_seconds or 0.0) for r in records)
    lines = [
        f"{len(found) - len(missing)} of {len(found)} families measured in {len(records)} cells, "
        f"{len(measured)} of which ran.",
        "",
        f"- Over their budget: {len(over)} of {len(measured)}.",
        f"- Bits: {bits['eager']} of {len(compared)} cells have eager PyTorch's, {bits['traced']} "
        "those of the traced step, which differs from eager PyTorch's without a plan already; "
        f"{bits['unplanned']} those of Packlight's step without a budget, where PyTorch cannot run "
        "what it traced, or computes something else than eager PyTorch; "
        f"{bits['other']} have others.",
        f"- Families whose graph breaks, measured in pieces: {len(broken)}.",
        f"- Predicted peaks are off by at most {max(errors, default=0.0):.2%}.",
        f"- Capture, profiling and planning took {seconds / 60:.0f} minutes in all.",
    ]
    if rounded:
        worst = max(r.relative_error or 0.0 for r in rounded)
        lines.append(
            f"- {len(rounded)} cells round sums in another order: their gradients are off by at "
            f"most {worst:.0e}."
        )
    lines.append(
        f"- Families with a failure in any cell: {len(failing)} (below the matrix)."
        if failing else "- No family fails in any cell."
    )
    if missing:
        lines.append(f"- Not measured yet: {', '.join(missing)}.")
    return lines


def conditions(records: Iterable[Record]) -> str:
    """Return where, when and with what the lines were made."""
    made = [r.provenance for r in records if r.provenance]
    if not made:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in made[-1]["versions"].items())
    stamps = sorted(p["timestamp"] for p in made)
    commits = ", ".join(dict.fromkeys(p["commit"] for p in made))
    seeds = ", ".join(dict.fromkeys(str(p["seed"]) for p in made))
    return (
        f"{made[-1]['hardware']}, one thread, {versions}, commit {commits}, seed {seeds}, "
        f"{stamps[0]} to {stamps[-1]}."
    )


# -- the matrix


def matrix(found: ByFamily) -> list[str]:
    """Return the table of some families."""
    header = ["family", "operations", *(str(config) for config in CONFIGS), "prediction off by",
              "plan, s", EXACT, ALL]
    rows = []
    for name, records in found.items():
        compiled = [r for r in records if r.path == COMPILE]
        errors = [r.prediction_error for r in records if r.prediction_error is not None]
        rows.append([
            name,
            _range([r.num_operations for r in compiled if r.num_operations is not None]),
            *(config_cell([r for r in compiled if r.cell.config == c]) for c in CONFIGS),
            f"{max(errors):.2%}" if errors else "-",
            _most([r.plan_seconds for r in compiled if r.plan_seconds is not None]),
            fit_cell([r for r in records if r.path == EXACT]),
            fit_cell([r for r in records if r.path == ALL]),
        ])
    return table(header, rows)


def config_cell(records: list[Record]) -> str:
    """Return whose bits one configuration has, and its smallest peak; or how it fails."""
    if not records:
        return "-"
    bad = [r for r in records if r.failure is not None]
    if bad:
        names = ", ".join(dict.fromkeys(r.failure or "" for r in bad))
        return f"**{names}**" + (f" ({len(bad)} of {len(records)})" if len(bad) < len(records)
                                 else "")
    whose = next((r.bits or "-" for r in records if r.bits != "eager"), "eager")
    smallest = next((r for r in records if r.setting == SMALLEST), None)
    pieces = max((r.num_pieces for r in records if r.num_pieces is not None), default=None)
    return ", ".join([
        whose, *([] if smallest is None else [share(smallest)]),
        *([] if pieces is None else [f"{pieces} pieces"]),
    ])


def fit_cell(records: list[Record]) -> str:
    """Return what a cell through `fit` shows."""
    if not records or records[0].failure is not None:
        return config_cell(records)
    (record,) = records
    if record.is_exact:
        return f"{record.bits}, {share(record)}"
    if record.draws:
        return f"other draws, {share(record)}"
    return f"{record.relative_error or 0.0:.0e}, {share(record)}"


def share(record: Record) -> str:
    """Return the measured peak in percent of the plain eager step's."""
    if not record.peak_bytes or not record.eager_peak_bytes:
        return "-"
    return f"{100 * record.peak_bytes / record.eager_peak_bytes:.0f}%"


def _range(values: list[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _most(values: list[float]) -> str:
    return f"{max(values):.1f}" if values else "-"


# -- breaks and failures


def breaks(found: ByFamily, reasons: Mapping[str, str]) -> list[str]:
    """Return a list of the families whose steps were measured in pieces, and why they break."""
    lines = []
    for name, records in found.items():
        causes = dict.fromkeys(cause for r in records for cause in r.breaks)
        if any(r.num_pieces is not None for r in records):
            lines.append(f"- **{name}**: {reasons.get(name) or '; '.join(causes)}")
    return lines or ["Nowhere."]


def failures(found: ByFamily, known: Mapping[str, str]) -> list[str]:
    """Return a list of everything that is not as promised, with its reason."""
    lines = []
    for name, records in found.items():
        wrong: dict[str, list[Record]] = {}
        for record in records:
            if record.failure is not None:
                wrong.setdefault(_what(record), []).append(record)
        for what, cells in wrong.items():
            where = "all cells" if len(cells) == len(records) else _where(cells)
            lines.append(f"- **{name}**, {where}: {what}")
        if wrong:
            lines.append(f"  - {known.get(name, 'No reason is known yet.')}")
        elif name in known and records:
            lines.append(f"- **{name}** is listed as failing, and does not: {known[name]}")
    return lines or ["Nothing."]


def _what(record: Record) -> str:
    if record.error is not None:
        return first_line(record.error)
    if record.is_over_budget:
        return f"over budget by {(record.peak_bytes or 0) - (record.budget_bytes or 0)} bytes"
    if record.failure == "other bits":
        names = record.traced_differences or record.differences or []
        return f"other bits than the traced step, first in {names[0]}"
    if record.failure == "other gradients":
        return f"gradients off by {record.relative_error:.0e}"
    if record.failure == "peak mispredicted":
        return f"predicted peak off by {record.prediction_error or 0.0:.1%}"
    return record.failure or ""


def _where(records: list[Record]) -> str:
    by_place: dict[tuple[Config, str], list[str]] = {}
    for record in records:
        by_place.setdefault((record.cell.config, record.path), []).append(record.setting)
    return "; ".join(
        f"{config}, {path} ({', '.join(settings)})"
        for (config, path), settings in by_place.items()
    )


if __name__ == "__main__":
    main()
