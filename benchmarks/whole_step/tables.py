"""Results as Markdown tables. Nothing here is measured; nothing is left out."""

from __future__ import annotations

from benchmarks.common import (
    mebibytes,
    models_of,
    of_model,
    percent_off,
    ratio_or_reason,
    table,
)
from benchmarks.whole_step.records import EAGER, JOINT, SMALLEST, Record

BY_HAND = "by hand: "


def eager_of(records: list[Record]) -> Record:
    """Return eager's record among one model's."""
    return next(r for r in records if r.variant == EAGER)


def joint_of(records: list[Record]) -> list[Record]:
    """Return Packlight's cells with all moves, the largest budget first."""
    return _by_budget([r for r in records if r.variant == JOINT])


def by_hand_of(records: list[Record]) -> list[Record]:
    """Return what was done without Packlight, eager's plain step not included."""
    return [r for r in records if r.variant.startswith(BY_HAND)]


def variants_of(records: list[Record]) -> dict[str, list[Record]]:
    """Return the cells with fewer or other moves by variant, the largest budget first."""
    found: dict[str, list[Record]] = {}
    for record in _by_budget([r for r in records if r.budget_bytes is not None]):
        if record.variant != JOINT:
            found.setdefault(record.variant, []).append(record)
    return found


def over_budget(records: list[Record]) -> list[Record]:
    """Return the cells in which a step held more than its budget."""
    return [r for r in records if r.is_over_budget]


def _by_budget(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda r: -(r.budget_bytes or 0))


# -- cells of tables


def moves(record: Record) -> str:
    """Return what was done to fit."""
    return ", ".join(record.moves) or "-"


def refused(record: Record) -> str:
    """Return which smaller budgets an error had named in vain; "" if none."""
    if not record.refused_bytes:
        return ""
    sizes = ", ".join(str(size) for size in record.refused_bytes)
    return f" ({sizes} bytes were named first, and refused)"


def share(num_bytes: int | None, eager: Record) -> str:
    """Return bytes in percent of eager's peak."""
    if num_bytes is None or not eager.peak_bytes:
        return "-"
    return f"{num_bytes / eager.peak_bytes:.0%}"


def above_parameters(record: Record) -> str:
    """Return the measured peak without the model's parameters."""
    if record.peak_bytes is None:
        return "-"
    return mebibytes(record.peak_bytes - record.parameter_bytes)


def exactness(record: Record) -> str:
    """Return whether the first step's results are eager's, and how far off if not."""
    if record.same_bits is None:
        return "-"
    if all(record.same_bits.values()):
        return "yes"
    return f"loss {record.loss_difference or 0:.0e}, update {record.update_error or 0:.0e}"


# -- tables


def budget_table(records: list[Record]) -> list[str]:
    """Return one model's Packlight cells with all moves."""
    eager = eager_of(records)
    rows = []
    for record in joint_of(records):
        rows.append([
            record.setting + refused(record),
            moves(record) + (f" (as {record.same_as})" if record.same_as else ""),
            mebibytes(record.budget_bytes),
            mebibytes(record.peak_bytes) + (" **over**" if record.is_over_budget else ""),
            share(record.peak_bytes, eager),
            above_parameters(record),
            percent_off(record.predicted_peak_bytes, record.peak_bytes),
            ratio_or_reason(record),
            percent_off(record.predicted_seconds, record.seconds_median),
            "-" if record.fit_seconds is None else f"{record.fit_seconds:.0f}",
            exactness(record),
        ])
    header = ["budget", "moves", "MiB", "measured peak, MiB", "of eager", "above parameters, MiB",
              "predicted peak off by", "time", "predicted time off by", "fit, s", "eager's bits"]
    return table(header, rows, right_from=2)


def by_hand_table(records: list[Record]) -> list[str]:
    """Return one model's eager steps: plain, and with what can be done by hand."""
    eager = eager_of(records)
    rows = [
        [
            r.variant.removeprefix(BY_HAND), mebibytes(r.peak_bytes), share(r.peak_bytes, eager),
            above_parameters(r), ratio_or_reason(r), exactness(r),
        ]
        for r in (eager, *by_hand_of(records))
    ]
    header = ["step", "peak, MiB", "of eager", "above parameters, MiB", "time", "eager's bits"]
    return table(header, rows)


def variant_table(records: list[Record]) -> list[str]:
    """Return one model's cells with fewer or other moves, beside all moves at that budget."""
    rows = []
    joint = {r.setting: r for r in joint_of(records)}
    variants = variants_of(records)
    settings = list(dict.fromkeys(r.setting for found in variants.values() for r in found))
    for setting in settings:
        here = [r for found in variants.values() for r in found if r.setting == setting]
        together = joint.get(setting)
        for record in [*([together] if together else []), *here]:
            rows.append([
                setting, record.variant, moves(record), mebibytes(record.peak_bytes),
                ratio_or_reason(record), exactness(record),
            ])
    header = ["budget", "allowed", "moves", "peak, MiB", "time",
              "eager's bits"]
    return table(header, rows, right_from=3)


def training_table(records: list[Record]) -> list[str]:
    """Return the training runs beside eager's; nothing where there are none."""
    rows = [
        [
            r.setting, moves(r), mebibytes(r.peak_bytes), str(r.num_trained_steps),
            f"{r.validation_loss:.4f}", f"{r.eager_validation_loss:.4f}",
            f"{r.training_loss_difference or 0:.1e}",
        ]
        for r in joint_of(records)
        if r.validation_loss is not None
    ]
    header = ["budget", "moves", "peak, MiB", "steps", "validation loss", "eager's",
              "largest relative difference of a step's loss"]
    return table(header, rows, right_from=2) if rows else []


def budget_lines(records: list[Record]) -> list[str]:
    """Return the sentence on budgets kept, and a list of those that were not."""
    ran = [r for r in records if r.budget_bytes is not None and r.peak_bytes is not None]
    broken = over_budget(ran)
    if not ran:
        return []
    errors = [abs((r.predicted_peak_bytes or 0) / (r.peak_bytes or 1) - 1) for r in ran]
    lines = [
        f"{len(ran) - len(broken)} of {len(ran)} cells kept to their budget; predicted peaks are "
        f"off by at most {max(errors):.2%}."
    ]
    lines += [
        f"- {r.model}, {r.setting}, {r.variant}: {mebibytes(r.peak_bytes)} of "
        f"{mebibytes(r.budget_bytes)} MiB" for r in broken
    ]
    return lines


def summary_table(records: list[Record]) -> list[str]:
    """Return each model at a few budgets."""
    rows = []
    for model in models_of(records):
        mine = of_model(records, model)
        eager = eager_of(mine)
        joint = {r.setting: r for r in joint_of(mine)}
        smallest = joint.get(SMALLEST)
        rows.append([
            eager.title, mebibytes(eager.peak_bytes), f"{eager.seconds_median or 0:.2f}",
            _short(joint.get("70%")), _short(joint.get("50%")), _short(joint.get("35%")),
            "-" if smallest is None else mebibytes(smallest.peak_bytes),
            "-" if smallest is None else share(smallest.peak_bytes, eager),
            _short(smallest),
        ])
    header = ["step", "eager, MiB", "s", "at 70%", "at 50%", "at 35%", "smallest, MiB", "of eager",
              "time there"]
    return table(header, rows)


def _short(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.ratio_median is None:
        return "infeasible" if record.smallest_bytes is not None else "failed"
    return f"{record.ratio_median:.2f}x"
