"""Writes the tables and plots from the JSON lines: `python -m benchmarks.peers.report`.

Tables go between markers in this folder's README and in the project's, plots to docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import ROOT, replace_between_markers
from benchmarks.peers import tables
from benchmarks.peers.duels import read_reasons
from benchmarks.peers.plot import plot
from benchmarks.peers.records import (
    EAGER,
    REMATCHES,
    RESULTS,
    Record,
    read_records,
    read_rematches,
)


def main() -> None:
    """Regenerate everything that is made from the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rematches", type=Path, default=REMATCHES)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    arguments = parser.parse_args()
    records = measured(read_records(arguments.results))
    if not records:
        raise SystemExit(f"{arguments.results}: no results; run python -m benchmarks.peers first")
    docs = arguments.root / "docs"
    for model in tables.models_of(records):
        figure = plot(tables.of_model(records, model))
        figure.savefig(docs / plot_name(model), dpi=110, metadata={"Software": None})
    readme = arguments.root / "benchmarks" / "peers" / "README.md"
    report = full_report(records, read_reasons(), read_rematches(arguments.rematches))
    replace_between_markers(readme, "peers", report)
    replace_between_markers(arguments.root / "README.md", "peers", tables.summary_table(records))


def measured(records: list[Record]) -> list[Record]:
    """Return the records of models whose eager step was measured, without which nothing counts."""
    known = {r.model for r in records if r.tool == EAGER and r.was_timed}
    return [r for r in records if r.model in known]


def plot_name(model: str) -> str:
    """Return the file name of a model's plot."""
    return f"peers_{model}.png"


def full_report(
    records: list[Record], reasons: tables.Reasons, rematches: tables.Rematches = ()
) -> list[str]:
    """Return the lines of all tables."""
    lines = ["", "### How small each model gets", "", *tables.smallest_table(records), ""]
    lines += ["### Where a rival wins at its own peak", ""]
    lines += [tables.duel_counts(records, rematches), ""]
    lines += [*tables.lost_table(records, reasons, rematches), ""]
    lines += [*tables.budget_lines(records), ""]
    lines += ["### How long the benchmark takes", "", *tables.wall_table(records), ""]
    for model in tables.models_of(records):
        mine = tables.of_model(records, model)
        lines += [
            f"### {tables.eager_of(mine).title}", "",
            f"![{model}: peak against time](../../docs/{plot_name(model)})", "",
            _conditions(mine, [r for r in rematches if r.model == model]), "",
            "Each rival, and the fastest of Packlight's cells that hold no more:", "",
            *tables.duel_table(mine, rematches), "",
            "All Packlight cells:", "",
            *tables.plan_table(mine), "",
        ]
    return lines


def _conditions(records: list[Record], rematches: tables.Rematches) -> str:
    eager = tables.eager_of(records)
    made = eager.provenance
    # A rival that runs in an environment of its own brings versions of its own.
    everyone = {k: v for r in records for k, v in r.provenance.get("versions", {}).items()}
    versions = ", ".join(f"{name} {number}" for name, number in everyone.items())
    low, high = eager.ratio_quartiles or (1.0, 1.0)
    commits = " and ".join(dict.fromkeys(r.provenance["commit"] for r in records))
    rounds = max(r.num_rounds for r in records)
    again = " and ".join(dict.fromkeys(r.provenance["commit"] for r in rematches))
    side_by_side = f" Side by side: commit {again}." if again else ""
    by_group = [r.eager_seconds_median for r in records if r.eager_seconds_median is not None]
    return (
        f"{made['hardware']}, {versions}, commit {commits}, seed {made['seed']}, "
        f"{made['timestamp']}; {rounds} rounds. Eager holds {tables.mebibytes(eager.peak_bytes)} "
        f"MiB and takes {eager.seconds_median:.3f} s; an eager step against another one in the "
        f"same round: {low:.3f} to {high:.3f} (the machine's noise). Beside the other cells its "
        f"median was {min(by_group):.3f} to {max(by_group):.3f} s (the machine's drift: small "
        "differences between cells that were not timed together say little)." + side_by_side
    )


if __name__ == "__main__":
    main()
