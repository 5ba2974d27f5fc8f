"""Tables of the README, from the JSON lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comm.codecs import Speed
from benchmarks.comm.train import Record
from benchmarks.common import read_lines, replace_between_markers, table

README = Path(__file__).parent / "README.md"


def write(results: Path, codecs: Path) -> None:
    """Write the tables of all lines that there are into the README."""
    records = read_lines(results, Record)
    local = [r for r in records if not r.network]
    shaped = [r for r in records if r.network]
    replace_between_markers(README, "methods", table_of_methods(local))
    replace_between_markers(README, "network", table_of_network(shaped))
    replace_between_markers(README, "codecs", table_of_codecs(read_lines(codecs, Speed)))


def table_of_methods(records: Sequence[Record]) -> list[str]:
    """Return a row for each method: bytes, and loss beside the same seeds of its baseline."""
    rows = []
    for method in dict.fromkeys(r.method for r in records):
        mine = [r for r in records if r.method == method]
        base = {r.seed: r for r in records if r.method == mine[0].baseline}
        losses = [r.validation_loss for r in mine]
        pairs = [(r, base[r.seed]) for r in mine if r.seed in base]
        changes = [100 * (r.validation_loss / b.validation_loss - 1) for r, b in pairs]
        less = [b.bytes_per_step / r.bytes_per_step for r, b in pairs]
        rows.append([
            method, mine[0].library, f"{statistics.median(r.bytes_per_step for r in mine):,.0f}",
            f"1/{statistics.median(less):,.3g}" if less else "-",
            f"{statistics.median(losses):.4f}",
            f"{statistics.median(changes):+.2f}%" if changes else "-",
            f"{min(changes):+.2f} to {max(changes):+.2f}" if changes else "-",
            str(len(mine)),
        ])
    header = [
        "method", "library", "bytes a step and worker", "of DDP's", "validation loss",
        "beside DDP", "spread", "seeds",
    ]
    return [*table(header, rows, right_from=2), "", *_made(records)]


def table_of_network(records: Sequence[Record]) -> list[str]:
    """Return milliseconds of a step on links of each rate."""
    rates = list(dict.fromkeys(r.network for r in records))
    rows = []
    for method in dict.fromkeys(r.method for r in records):
        row = [method]
        for rate in rates:
            times = [r.seconds / r.num_steps for r in records
                     if r.method == method and r.network == rate]
            row.append(f"{1e3 * statistics.median(times):.0f}" if times else "-")
        rows.append(row)
    return [*table(["ms a step", *rates], rows), "", *_made(records)]


def table_of_codecs(speeds: Sequence[Speed]) -> list[str]:
    """Return a row for each codec."""
    rows = [
        [
            f"`{s.codec}`", f"{s.compress_gigabytes_per_second:.2f} ({s.compress_median:.2f})",
            f"{s.combine_gigabytes_per_second:.2f} ({s.combine_median:.2f})", f"{s.share:.4f}",
            f"{s.break_even_gigabits_per_second:.2f}",
        ]
        for s in speeds
    ]
    header = [
        "codec", "compress, GB/s of fp32: best (median)", "decode", "share of fp32's bytes",
        "break-even, Gbit/s",
    ]
    return [*table(header, rows), "", *_made(speeds)]


def _made(lines: Sequence[Record] | Sequence[Speed]) -> list[str]:
    if not lines:
        return ["No lines yet."]
    made = lines[-1].provenance
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    load = [line.provenance["load_at_start"] for line in lines]
    return [
        f"{made['hardware']}, {made['cores']} cores, load {min(load)} to {max(load)}, "
        f"{versions}, commit {made['commit']}, {made['timestamp']}; `{made['command']}`."
    ]
