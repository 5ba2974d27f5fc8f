"""Writes the tables and plots from the JSON lines: `python -m benchmarks.spine.report`.

Tables go between markers in this folder's README and in the project's, plots to docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, replace_between_markers
from benchmarks.spine import tables
from benchmarks.spine.records import RESULTS, Record, read_records
from packlight.report.style import LIGHT, drawing

RIVAL_STYLE = {
    "torch.utils.checkpoint": ("s", "budget"),
    "selective checkpoint": ("D", "allocated"),
    "checkpoint_sequential": ("^", "optimizer"),
    "activation_memory_budget": ("v", "bound"),
    "inductor": ("x", "muted"),
}


def main() -> None:
    """Regenerate everything that is made from the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spine.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    arguments = parser.parse_args()
    records = read_records(arguments.results)
    if not records:
        raise SystemExit(f"{arguments.results}: no results; run python -m benchmarks.spine first")
    docs = arguments.root / "docs"
    for model in tables.models_of(records):
        figure = plot(tables.of_model(records, model))
        figure.savefig(docs / plot_name(model), dpi=110, metadata={"Software": None})
    replace_between_markers(
        arguments.root / "benchmarks" / "spine" / "README.md", "spine", full_report(records)
    )
    replace_between_markers(
        arguments.root / "README.md", "spine", tables.summary_table(records)
    )


def plot_name(model: str) -> str:
    """Return the file name of a model's plot."""
    return f"spine_{model}.png"


def full_report(records: list[Record]) -> list[str]:
    """Return the lines of all tables."""
    lines = ["", "### How small each model gets", "", *tables.smallest_table(records), ""]
    lines += ["### Where a rival is faster at its own peak", "", *tables.lost_duels(records), ""]
    for model in tables.models_of(records):
        mine = tables.of_model(records, model)
        eager = tables.eager_of(mine)
        lines += [
            f"### {eager.title}", "",
            f"![{model}: peak against time](../../docs/{plot_name(model)})", "",
            _conditions(mine), "",
            "Each rival, and Packlight with that rival's measured peak as its budget:", "",
            *tables.duel_table(mine), "",
            "All Packlight cells, predicted beside measured:", "",
            *tables.plan_table(mine), "",
            "Eager and all rivals:", "",
            *tables.rival_table(mine), "",
        ]
    return lines


def _conditions(records: list[Record]) -> str:
    eager = tables.eager_of(records)
    made = eager.provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    watched = [r for r in records if r.planner_bytes is not None]
    planner = ""
    if watched:
        planner = (
            f" The captured step has {watched[0].num_operations} operations; planning it for half "
            f"of eager's peak held {tables.mebibytes(watched[0].planner_bytes)} MiB."
        )
    low, high = eager.ratio_quartiles or (1.0, 1.0)
    rounds = max(r.num_rounds for r in records if r.tool != tables.EAGER)
    return (
        f"{made['hardware']}, {versions}, commit {made['commit']}, seed {made['seed']}, "
        f"{made['timestamp']}; {rounds} rounds. Eager takes {eager.seconds_median:.3f} s; an "
        f"eager step against the one before it: {low:.3f} to {high:.3f} (the machine's noise)."
        + planner
    )


def plot(records: list[Record]) -> Any:
    """Return a figure of one model: peak against time ratio, rivals and Packlight."""
    eager = tables.eager_of(records)
    with drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(8.4, 4.4))
        axes = figure.add_axes((0.085, 0.12, 0.895, 0.68))
        axes.plot(
            _mebibytes([eager]), [1.0], "o", color=LIGHT["ink"], markersize=8, label="eager",
            zorder=4,
        )
        for tool, (marker, colour) in RIVAL_STYLE.items():
            found = [r for r in records if r.tool == tool and r.ratio_median is not None]
            if found:
                _points(axes, found, marker, LIGHT[colour], tool)
        ours = _distinct([
            r for r in records if r.tool == tables.PACKLIGHT and r.ratio_median is not None
        ])
        if ours:
            axes.plot(
                _mebibytes(ours), [r.ratio_median for r in ours], color=LIGHT["planned"],
                linewidth=1.2, alpha=0.6, zorder=2,
            )
            _points(axes, ours, "o", LIGHT["planned"], "Packlight")
        axes.axhline(1.0, color=LIGHT["rule"], linewidth=0.8, zorder=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("measured peak above parameters and batch, MiB")
        axes.set_ylabel("time of a step over eager's")
        figure.legend(loc="upper left", bbox_to_anchor=(0.075, 0.945), ncols=4, fontsize=8.0)
        figure.text(0.085, 0.955, eager.title, fontsize=9.5, fontweight="bold")
    return figure


def _points(axes: Any, records: list[Record], marker: str, colour: str, label: str) -> None:
    medians = [r.ratio_median or 0.0 for r in records]
    spreads = [r.ratio_quartiles or (m, m) for r, m in zip(records, medians, strict=True)]
    below = [max(0.0, m - s[0]) for m, s in zip(medians, spreads, strict=True)]
    above = [max(0.0, s[1] - m) for m, s in zip(medians, spreads, strict=True)]
    axes.errorbar(
        _mebibytes(records), medians, yerr=[below, above], fmt=marker, color=colour, label=label,
        markersize=6, elinewidth=0.9, alpha=0.95, zorder=3,
    )


def _distinct(records: list[Record]) -> list[Record]:
    """Return the cells that were timed themselves, by peak."""
    return sorted(
        (r for r in records if r.same_as is None), key=lambda r: r.peak_bytes or 0
    )


def _mebibytes(records: list[Record]) -> list[float]:
    return [(r.peak_bytes or 0) / 2**20 for r in records]


if __name__ == "__main__":
    main()
