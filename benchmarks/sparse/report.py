"""Writes the tables of the README from the JSON lines: `python -m benchmarks.sparse.report`."""

from __future__ import annotations

import statistics
import sys

from benchmarks.common import (
    mebibytes,
    median_and_quartiles,
    replace_between_markers,
    table,
)
from benchmarks.sparse.records import FOLDER, Record, read_records


def main() -> int:
    """Write the tables."""
    records = read_records()
    if not records:
        print("no results: run `make bench-sparse` first", file=sys.stderr)
        return 1
    of = {
        question: [r for r in records if r.question == question]
        for question in ("memory", "speed", "accuracy", "sparselab")
    }
    replace_between_markers(FOLDER / "README.md", "memory", memory_table(of["memory"]))
    replace_between_markers(FOLDER / "README.md", "speed", speed_table(of["speed"]))
    replace_between_markers(FOLDER / "README.md", "accuracy", accuracy_table(of["accuracy"]))
    replace_between_markers(FOLDER / "README.md", "sparselab", rival_table(of["sparselab"]))
    return 0


def memory_table(records: list[Record]) -> list[str]:
    """Return what is held, over the dense model's."""
    dense = {r.case: r.values for r in records if r.method == "dense"}
    rows = []
    for r in records:
        base = dense[r.case]
        share, of_all = (
            f"{r.values[name] / base[name]:.2%}" for name in ("resident_bytes", "held_bytes")
        )
        parts = [
            mebibytes(r.values.get(f"{name}_bytes"))
            for name in ("values", "index", "optimizer_state", "method")
        ]
        resident = mebibytes(r.values["resident_bytes"])
        rows.append([r.case, r.method, f"{r.density:.0%}", resident, share, of_all, *parts])
    header = [
        "model", "method", "density", "between steps, MiB", "of dense", "with gradients, of dense",
        "values", "index", "optimizer state", "the method's",
    ]
    return [*table(header, rows), "", *_made(records)]


def speed_table(records: list[Record]) -> list[str]:
    """Return times over the dense layer's."""
    densities = sorted({r.density for r in records})
    rows = []
    for case in dict.fromkeys(r.case for r in records):
        found = {r.density: r.values for r in records if r.case == case}
        cells = [
            median_and_quartiles(found[d]["ratio_median"], found[d]["ratio_quartiles"])
            if d in found else "-"
            for d in densities
        ]
        rows.append([case, *cells])
    return [*table(["layer", *[f"{d:.0%}" for d in densities]], rows), "", *_made(records)]


def rival_table(records: list[Record]) -> list[str]:
    """Return bytes and times beside sparselab's."""
    header = [
        "layer", "density", "ours, of dense bytes", "sparselab's",
        "... without its transposed copy",
        "our time over theirs", "ours over dense", "theirs over dense",
    ]
    rows = []
    for r in records:
        v = r.values
        shares = [
            f"{v[name] / v['dense_bytes']:.1%}"
            for name in ("our_bytes", "their_bytes", "their_bytes_without_transposed")
        ]
        rows.append([
            r.case, f"{r.density:.0%}", *shares,
            median_and_quartiles(v["ratio_median"], v["ratio_quartiles"]),
            f"{v['our_ratio_to_dense_median']:.2f}", f"{v['their_ratio_to_dense_median']:.2f}",
        ])
    return [*table(header, rows), "", *_made(records)]


def accuracy_table(records: list[Record]) -> list[str]:
    """Return mean accuracies and their spread over seeds."""
    densities = sorted({r.density for r in records}, reverse=True)
    rows = []
    for method in dict.fromkeys(r.method for r in sorted(records, key=_best_first(records))):
        cells = []
        for density in densities:
            found = [
                r.values["accuracy_percent"]
                for r in records if r.method == method and r.density == density
            ]
            cells.append(
                f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)})"
                if found else "-"
            )
        rows.append([method, *cells])
    steps = sorted({r.values["num_steps"] for r in records})
    about = f"Mean, least and most, number of seeds; {', '.join(map(str, steps))} steps."
    header = ["method", *[f"{d:.0%}" for d in densities]]
    return [*table(header, rows), "", about, *_made(records)]


def _best_first(records: list[Record]):  # type: ignore[no-untyped-def]
    lowest = min((r.density for r in records), default=0.0)

    def key(record: Record) -> tuple[bool, float]:
        found = [
            r.values["accuracy_percent"]
            for r in records if r.method == record.method and r.density == lowest
        ]
        return record.method != "dense", -statistics.mean(found) if found else 0.0

    return key


def _made(records: list[Record]) -> list[str]:
    if not records:
        return []
    made = records[0].provenance
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    loads = [r.provenance["load_at_start"] for r in records]
    return [
        f"{made['hardware']}, {made['cores']} cores, {versions}, commit {made['commit']}; load "
        f"{min(loads)} to {max(loads)}."
    ]


if __name__ == "__main__":
    sys.exit(main())
