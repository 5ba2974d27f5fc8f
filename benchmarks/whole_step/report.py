"""Writes the tables and plots from the JSON lines: `python -m benchmarks.whole_step.report`.

Tables go between markers in this folder's README, plots to docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import MEBIBYTE, ROOT, replace_between_markers
from benchmarks.whole_step import tables
from benchmarks.whole_step.records import RESULTS, SMALLEST, Record, read_records
from packlight.report.style import LIGHT, drawing

VARIANT_STYLE = (("s", "optimizer"), ("^", "bound"), ("D", "allocated"), ("v", "parameters"))
MODEL_STYLE = ("planned", "budget", "bound", "optimizer", "allocated", "batch", "muted")


def main() -> None:
    """Regenerate everything that is made from the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_step.report", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where benchmarks/ and docs/ are")
    arguments = parser.parse_args()
    records = measured(read_records(arguments.results))
    if not records:
        raise SystemExit(
            f"{arguments.results}: no results; run python -m benchmarks.whole_step first"
        )
    docs = arguments.root / "docs"
    settings = {"dpi": 110, "metadata": {"Software": None}}
    overview(records).savefig(docs / plot_name("all"), **settings)
    for model in tables.models_of(records):
        plot(tables.of_model(records, model)).savefig(docs / plot_name(model), **settings)
    readme = arguments.root / "benchmarks" / "whole_step" / "README.md"
    replace_between_markers(readme, "whole-step", full_report(records))


def measured(records: list[Record]) -> list[Record]:
    """Return the records of models whose eager step was measured, without which nothing counts."""
    known = {r.model for r in records if r.variant == tables.EAGER and r.peak_bytes is not None}
    return [r for r in records if r.model in known]


def plot_name(model: str) -> str:
    """Return the file name of a model's plot."""
    return f"whole_step_{model}.png"


def full_report(records: list[Record]) -> list[str]:
    """Return the lines of all tables."""
    lines = ["", f"![time against budget](../../docs/{plot_name('all')})", ""]
    lines += [*tables.summary_table(records), "", *tables.budget_lines(records), ""]
    for model in tables.models_of(records):
        mine = tables.of_model(records, model)
        lines += [
            f"### {tables.eager_of(mine).title}", "",
            f"![{model}: time against budget](../../docs/{plot_name(model)})", "",
            _conditions(mine), "",
            *tables.budget_table(mine), "",
            "Without Packlight:", "",
            *tables.by_hand_table(mine), "",
        ]
        if tables.variants_of(mine):
            lines += ["With fewer or other moves:", "", *tables.variant_table(mine), ""]
        training = tables.training_table(mine)
        if training:
            lines += ["Trained beside eager on the same batches:", "", *training, ""]
    return lines


def _conditions(records: list[Record]) -> str:
    eager = tables.eager_of(records)
    made = eager.provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    low, high = eager.ratio_quartiles or (1.0, 1.0)
    commits = " and ".join(dict.fromkeys(r.provenance["commit"] for r in records))
    return (
        f"{made['hardware']}, {versions}, commit {commits}, seed {made['seed']}, "
        f"{made['timestamp']}; {max(r.num_rounds for r in records)} rounds. Eager takes "
        f"{eager.seconds_median:.3f} s; an eager step against another one in the same round: "
        f"{low:.3f} to {high:.3f} (the machine's noise)."
    )


def plot(records: list[Record]) -> Any:
    """Return a figure of one model: budget against time ratio."""
    eager = tables.eager_of(records)
    with drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(8.4, 4.4))
        axes = figure.add_axes((0.085, 0.12, 0.895, 0.66))
        axes.plot(
            [_mebibytes(eager.peak_bytes)], [1.0], "o", color=LIGHT["ink"], markersize=8,
            label="eager", zorder=4,
        )
        _curve(axes, tables.joint_of(records), "o", "planned", "Packlight, all moves")
        for style, (name, found) in zip(
            VARIANT_STYLE, tables.variants_of(records).items(), strict=False
        ):
            _curve(axes, found, *style, f"Packlight, {name}")
        by_hand = [r for r in tables.by_hand_of(records) if r.ratio_median is not None]
        for marker, record in zip("x+*", by_hand, strict=False):
            axes.plot(
                [_mebibytes(record.peak_bytes)], [record.ratio_median], marker,
                color=LIGHT["muted"], markersize=8, label=record.variant,
            )
        axes.axhline(1.0, color=LIGHT["rule"], linewidth=0.8, zorder=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("budget of the whole step, MiB (by hand: measured peak)")
        axes.set_ylabel("time of a step over eager's")
        figure.legend(loc="upper left", bbox_to_anchor=(0.075, 0.945), ncols=3, fontsize=8.0)
        figure.text(0.085, 0.955, eager.title, fontsize=9.5, fontweight="bold")
    return figure


def overview(records: list[Record]) -> Any:
    """Return a figure of all models: budget in percent of eager's peak against time ratio."""
    with drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(8.4, 4.4))
        axes = figure.add_axes((0.085, 0.12, 0.895, 0.76))
        for index, model in enumerate(tables.models_of(records)):
            mine = tables.of_model(records, model)
            eager_bytes = tables.eager_of(mine).peak_bytes or 1
            cells = [r for r in tables.joint_of(mine) if r.ratio_median is not None]
            colour = LIGHT[MODEL_STYLE[index % len(MODEL_STYLE)]]
            shares = [100 * (r.budget_bytes or 0) / eager_bytes for r in cells]
            ratios = [r.ratio_median for r in cells]
            axes.plot(
                shares, ratios, "-o", color=colour, linewidth=1.2, markersize=4, label=model
            )
            for record, x, y in zip(cells, shares, ratios, strict=True):
                if record.setting == SMALLEST:
                    axes.plot([x], [y], "o", color=colour, markersize=8, fillstyle="none")
        axes.axhline(1.0, color=LIGHT["rule"], linewidth=0.8, zorder=1)
        axes.set_xlim(0, 105)
        axes.set_xlabel("budget, % of the plain step's peak (ringed: the smallest feasible)")
        axes.set_ylabel("time of a step over eager's")
        figure.legend(loc="upper left", bbox_to_anchor=(0.075, 0.985), ncols=6, fontsize=8.0)
    return figure


def _curve(axes: Any, records: list[Record], marker: str, colour: str, label: str) -> None:
    found = [r for r in records if r.ratio_median is not None]
    if not found:
        return
    medians = [r.ratio_median or 0.0 for r in found]
    spreads = [r.ratio_quartiles or (m, m) for r, m in zip(found, medians, strict=True)]
    errors = [
        [max(0.0, m - s[0]) for m, s in zip(medians, spreads, strict=True)],
        [max(0.0, s[1] - m) for m, s in zip(medians, spreads, strict=True)],
    ]
    axes.errorbar(
        [_mebibytes(r.budget_bytes) for r in found], medians, yerr=errors, fmt=f"-{marker}",
        color=LIGHT[colour], label=label, markersize=5, linewidth=1.0, elinewidth=0.9, alpha=0.95,
        zorder=3,
    )


def _mebibytes(num_bytes: int | None) -> float:
    return (num_bytes or 0) / MEBIBYTE


if __name__ == "__main__":
    main()
