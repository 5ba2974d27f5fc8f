"""Writes the tables and the chart of what was found: `python -m benchmarks.largest.report`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, first_line, mebibytes, replace_between_markers, table
from benchmarks.largest.records import FOLDER, RESULTS, Found, Record, found, read_records
from benchmarks.largest.tools import TOOLS
from benchmarks.largest.trial import OUT_OF_MEMORY, TRAINED
from packlight.report.style import LIGHT, drawing
from packlight.units import format_bytes

README = FOLDER / "README.md"
CHART = ROOT / "docs" / "largest.png"


def main() -> None:
    """Write README's tables and the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest.report")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--chart", type=Path, default=CHART)
    arguments = parser.parse_args()
    records = read_records(arguments.results)
    if not records:
        raise SystemExit(f"{arguments.results}: no results")
    replace_between_markers(arguments.readme, "largest", full_report(records))
    chart(records).savefig(arguments.chart, dpi=110, metadata={"Software": None})


def limits_of(records: list[Record]) -> list[int]:
    """Return the limits that were tried, the smallest first."""
    return sorted({r.limit_bytes for r in records})


def by_tool(records: list[Record]) -> dict[str, dict[int, Found]]:
    """Return what was found, for each tool that was tried, by limit.

    What trains within a smaller limit stands where a tool was not tried itself.
    """
    result: dict[str, dict[int, Found]] = {}
    for tool in TOOLS:
        mine = [r for r in records if r.tool == tool]
        for limit in limits_of(records):
            smaller = [r for r in mine if r.limit_bytes < limit and r.result.outcome == TRAINED]
            tried = [r for r in mine if r.limit_bytes == limit] or smaller
            if tried:
                result.setdefault(tool, {})[limit] = found(tried)
    return result


def full_report(records: list[Record]) -> list[str]:
    """Return all that stands between the markers."""
    made = records[-1].provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    commits = " and ".join(dict.fromkeys(r.provenance["commit"] for r in records))
    limits = {format_bytes(limit): limit for limit in limits_of(records)}
    hours = sum(r.result.seconds or 0.0 for r in records) / 3600
    return [
        f"![Blocks that train within each limit](../../docs/{CHART.name})", "",
        *depth_table(records), "",
        "`>`: deeper models were stopped by the time limit of a trial, not by memory. `>=`: the "
        "search was not carried to its end, deeper models may train; or not begun, and this is "
        "what trains within a smaller limit. `-`: not run.", "",
        *promise_lines(records), "",
        *(line for limit in limits.values() for line in detail(records, limit)),
        f"{made['hardware']}, {made['cores']} cores of which trials use one, {versions}, commit "
        f"{commits}, seed {made['seed']}; {len(records)} trials of at most "
        f"{max(r.time_limit_seconds for r in records):.0f} s, {hours:.1f} hours in all, until "
        f"{made['timestamp']}.",
    ]


def depth_table(records: list[Record]) -> list[str]:
    """Return depth and parameters for each tool and limit."""
    limits = limits_of(records)
    rows = [
        [name, TOOLS[name].changes or "nothing", *(_depth(held.get(limit)) for limit in limits)]
        for name, held in by_tool(records).items()
    ]
    return table(["tool", "changes", *map(format_bytes, limits)], rows, right_from=2)


def _depth(one: Found | None) -> str:
    if one is None:
        return "-"
    if one.error:
        return f"failed: {first_line(one.error)}"
    if one.best is None or one.best.num_parameters is None:
        return "0"
    return f"{_sign(one)}{one.depth} blocks, {one.best.num_parameters / 1e6:.0f} M"


def _sign(one: Found) -> str:
    """Return what stands before a depth that need not be the greatest."""
    return "> " if one.stopped_by_time else ">= " if one.failed is None else ""


def promise_lines(records: list[Record]) -> list[str]:
    """Return how often a step that `fit` promised was refused memory by the kernel."""
    promised = [r for r in records if r.result.predicted_bytes is not None]
    broken = [r for r in promised if r.result.outcome == OUT_OF_MEMORY]
    words = f"{len(promised)} models were planned by `packlight.fit` and then trained"
    if not broken:
        return [f"{words}; the kernel refused memory to none of them."]
    named = ", ".join(
        f"{r.tool} with {r.result.depth} blocks in {format_bytes(r.limit_bytes)}" for r in broken
    )
    return [f"{words}; the kernel refused memory to {len(broken)} of them: {named}."]


def detail(records: list[Record], limit_bytes: int) -> list[str]:
    """Return where each tool ends within one limit, and on what."""
    rows = []
    for name, held in by_tool([r for r in records if r.limit_bytes == limit_bytes]).items():
        one = held[limit_bytes]
        best, failed = one.best, one.failed
        rows.append([
            name, str(one.depth),
            "-" if failed is None else f"{failed.depth}: {failed.outcome}",
            mebibytes(best.held_bytes if best else None),
            mebibytes(best.budget_bytes if best else None),
            mebibytes(best.predicted_bytes if best else None),
            ", ".join(best.moves) if best and best.moves else "-",
        ])
    header = [
        "tool", "blocks", "the next that did not train", "process before, MiB", "budget",
        "predicted", "moves",
    ]
    return [f"### {format_bytes(limit_bytes)}", "", *table(header, rows), ""]


def chart(records: list[Record]) -> Any:
    """Return a figure with a bar for each tool and limit."""
    tools, limits = by_tool(records), limits_of(records)
    colours = [LIGHT[name] for name in ("bound", "planned", "optimizer", "allocated")]
    height = 0.8 / len(limits)
    with drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(8.4, 1.2 + 0.24 * len(limits) * len(tools)))
        top = 1 - 0.55 / figure.get_figheight()
        bottom = 0.5 / figure.get_figheight()
        axes = figure.add_axes((0.42, bottom, 0.52, top - bottom))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        for index, limit in enumerate(limits):
            places = [i + (index - (len(limits) - 1) / 2) * height for i in range(len(tools))]
            depths = [held[limit].depth if limit in held else 0 for held in tools.values()]
            axes.barh(
                places, depths, height * 0.9, color=colours[index % len(colours)],
                label=format_bytes(limit),
            )
            for place, held in zip(places, tools.values(), strict=True):
                if limit in held:
                    axes.annotate(
                        f"{_sign(held[limit])}{held[limit].depth}",
                        (held[limit].depth, place), (3, 0),
                        textcoords="offset points", va="center", fontsize=7.5,
                    )
        axes.set_yticks(range(len(tools)), [textwrap.fill(tool, 36) for tool in tools])
        axes.invert_yaxis()
        axes.set_xlabel("blocks that train")
        figure.legend(loc="upper right", bbox_to_anchor=(0.95, 1.0), ncols=3, fontsize=8.0)
        figure.text(
            0.02, top + 0.12 / figure.get_figheight(),
            "GPT of width 768: blocks within so much process memory", fontsize=9.5,
            fontweight="bold",
        )
    return figure


if __name__ == "__main__":
    main()
