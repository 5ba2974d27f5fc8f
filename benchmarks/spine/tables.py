"""Results as Markdown tables. Nothing here is measured; nothing is left out."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import (
    first_line,
    mebibytes,
    median_and_quartiles,
    models_of,
    of_model,
    percent_off,
    table,
)
from benchmarks.spine.records import Record

PACKLIGHT, EAGER = "packlight", "eager"
UNPLANNED, SMALLEST = "unplanned", "smallest feasible"


@dataclass(frozen=True)
class Duel:
    """A rival, and Packlight at that rival's measured peak.

    Attributes:
        rival: its record.
        ours: Packlight's record; its `error` says so where that budget is infeasible.
    """

    rival: Record
    ours: Record

    @property
    def is_won(self) -> bool:
        """Whether Packlight's median is below the rival's."""
        return (
            self.ours.ratio_median is not None
            and self.rival.ratio_median is not None
            and self.ours.ratio_median < self.rival.ratio_median
        )

    @property
    def is_within_spread(self) -> bool:
        """Whether the interquartile ranges of the two overlap."""
        mine, theirs = self.ours.ratio_quartiles, self.rival.ratio_quartiles
        if mine is None or theirs is None:
            return False
        return mine[0] <= theirs[1] and theirs[0] <= mine[1]


def eager_of(records: list[Record]) -> Record:
    """Return eager's record among one model's."""
    return next(r for r in records if r.tool == EAGER)


def rivals_of(records: list[Record]) -> list[Record]:
    """Return what is neither eager nor Packlight."""
    return [r for r in records if r.tool not in (EAGER, PACKLIGHT)]


def duels_of(records: list[Record]) -> list[Duel]:
    """Return one model's duels, the rival with the largest peak first."""
    ours = {r.rival: r for r in records if r.tool == PACKLIGHT and r.rival is not None}
    duels = [Duel(r, ours[r.name]) for r in rivals_of(records) if r.name in ours]
    return sorted(duels, key=lambda d: -(d.rival.peak_bytes or 0))


def unplanned_of(records: list[Record]) -> Record | None:
    """Return the record of the captured step without a budget."""
    return next((r for r in records if r.tool == PACKLIGHT and r.setting == UNPLANNED), None)


def smallest_of(records: list[Record]) -> Record | None:
    """Return Packlight's record at its smallest feasible budget."""
    return next((r for r in records if r.tool == PACKLIGHT and r.setting == SMALLEST), None)


# -- cells of tables


def ratio(record: Record) -> str:
    """Return a time ratio with its interquartile range."""
    return median_and_quartiles(record.ratio_median, record.ratio_quartiles)


def bits(record: Record) -> str:
    """Return whether a step's results are eager's, and what differs."""
    if record.same_bits is None:
        return "-"
    different = [name for name, same in record.same_bits.items() if not same]
    if not different:
        return "yes"
    error = record.gradient_error
    size = f" (gradients off by {error:.0e})" if error else ""
    return f"no: {', '.join(different)}{size}"


def measured_slowdown(record: Record, unplanned: Record | None) -> float | None:
    """Return a plan's time over the plain captured step's: what its prediction is about."""
    if unplanned is None or not unplanned.ratio_median or record.ratio_median is None:
        return None
    return record.ratio_median / unplanned.ratio_median


# -- tables


def duel_table(records: list[Record]) -> list[str]:
    """Return one model's rivals, each beside Packlight at that rival's peak."""
    rows = []
    for duel in duels_of(records):
        failed = duel.ours.error
        ours = ratio(duel.ours) if failed is None else f"infeasible ({first_line(failed)})"
        rows.append([
            duel.rival.name, mebibytes(duel.rival.peak_bytes), ratio(duel.rival),
            mebibytes(duel.ours.peak_bytes), ours, verdict(duel),
        ])
    for rival in rivals_of(records):
        if rival.error is not None:
            rows.append([rival.name, "failed", first_line(rival.error), "-", "-", "-"])
    header = ["rival", "its peak, MiB", "its time", "our peak, MiB", "our time", "faster"]
    return table(header, rows)


def verdict(duel: Duel) -> str:
    """Return who is faster."""
    if duel.ours.ratio_median is None or duel.rival.ratio_median is None:
        return "rival" if duel.ours.error else "-"
    winner = "Packlight" if duel.is_won else "rival"
    return winner + (", within the spread" if duel.is_within_spread else "")


def plan_table(records: list[Record]) -> list[str]:
    """Return one model's Packlight cells: what was predicted beside what was measured."""
    unplanned = unplanned_of(records)
    eager = eager_of(records)
    rows = []
    cells = [r for r in records if r.tool == PACKLIGHT]
    for record in sorted(cells, key=lambda r: -(r.peak_bytes or 0)):
        if record.error is not None:
            rows.append([record.setting, mebibytes(record.budget_bytes),
                         first_line(record.error), *["-"] * 8])
            continue
        slowdown = measured_slowdown(record, unplanned)
        share = (record.peak_bytes or 0) / (eager.peak_bytes or 1)
        rows.append([
            record.setting,
            mebibytes(record.budget_bytes),
            mebibytes(record.peak_bytes),
            f"{share:.0%}",
            percent_off(record.predicted_peak_bytes, record.peak_bytes),
            ratio(record),
            "-" if record.predicted_slowdown is None else f"{record.predicted_slowdown:.3f}",
            "-" if slowdown is None else f"{slowdown:.3f}",
            percent_off(record.predicted_slowdown, slowdown),
            "-" if record.plan_seconds is None else f"{record.plan_seconds:.1f}",
            bits(record),
        ])
    header = ["setting", "budget, MiB", "peak, MiB", "of eager", "predicted peak off by",
              "time", "slowdown predicted", "measured", "off by", "planning, s", "eager's bits"]
    return table(header, rows)


def rival_table(records: list[Record]) -> list[str]:
    """Return one model's eager step and rivals with what they compute."""
    eager = eager_of(records)
    rows = [[EAGER, mebibytes(eager.peak_bytes), f"{eager.seconds_median or 0:.3f} s", "-", "-"]]
    for record in rivals_of(records):
        if record.error is not None:
            rows.append([record.name, "failed", first_line(record.error), "-", "-"])
            continue
        rows.append([
            record.name, mebibytes(record.peak_bytes), ratio(record),
            "-" if record.compile_seconds is None else f"{record.compile_seconds:.1f}",
            bits(record),
        ])
    return table(["tool", "peak, MiB", "time", "first step, s", "eager's bits"], rows)


def smallest_table(records: list[Record]) -> list[str]:
    """Return how small each model gets: ours, and the best rival's."""
    rows = []
    for model in models_of(records):
        mine = of_model(records, model)
        smallest = smallest_of(mine)
        rivals = [r for r in rivals_of(mine) if r.peak_bytes is not None]
        if smallest is None or smallest.peak_bytes is None or not rivals:
            continue
        best = min(rivals, key=lambda r: r.peak_bytes or 0)
        rows.append([
            model, mebibytes(eager_of(mine).peak_bytes), mebibytes(smallest.peak_bytes),
            ratio(smallest), mebibytes(best.peak_bytes), best.name, ratio(best),
            f"{smallest.peak_bytes / (best.peak_bytes or 1):.2f}",
        ])
    header = ["model", "eager, MiB", "Packlight's smallest, MiB", "time", "best rival's, MiB",
              "which is", "time", "ours over theirs"]
    return table(header, rows)


def lost_duels(records: list[Record]) -> list[str]:
    """Return a list of all cells in which a rival is faster than Packlight at its own peak."""
    lines = []
    for model in models_of(records):
        for duel in duels_of(of_model(records, model)):
            if duel.is_won or duel.rival.ratio_median is None:
                continue
            ours = "infeasible" if duel.ours.ratio_median is None else ratio(duel.ours)
            close = "; the spreads overlap" if duel.is_within_spread else ""
            lines.append(
                f"- {model}: {duel.rival.name} at {mebibytes(duel.rival.peak_bytes)} MiB takes "
                f"{ratio(duel.rival)}, Packlight {ours}{close}"
            )
    return lines or ["- none"]


def summary_table(records: list[Record]) -> list[str]:
    """Return the short table of the project's README: each model at a few points."""
    rows = []
    for model in models_of(records):
        mine = of_model(records, model)
        half = next((r for r in mine if r.tool == PACKLIGHT and r.setting.startswith("50%")), None)
        smallest = smallest_of(mine)
        per_block = next((d for d in duels_of(mine) if d.rival.setting == "per block"), None)
        eager = eager_of(mine)
        rows.append([
            eager.title, mebibytes(eager.peak_bytes), at(half), at(smallest),
            at(per_block.rival if per_block else None), at(per_block.ours if per_block else None),
        ])
    header = ["model", "eager, MiB", "half of it", "smallest", "torch.utils.checkpoint per block",
              "Packlight at that peak"]
    return table(header, rows)


def at(record: Record | None) -> str:
    """Return "peak MiB at ratio x"."""
    if record is None or record.ratio_median is None or record.peak_bytes is None:
        return "-" if record is None or not record.error else "infeasible"
    return f"{mebibytes(record.peak_bytes)} at {record.ratio_median:.2f}x"
