"""The HTML page of a study: error against peak and time, what mattered, what did not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight.report.style import LIGHT, css_variables, drawing, to_svg
from packlight.report.tables import Cell, bytes_cell, number_cell, seconds_cell, sortable_table
from packlight.report.template import CSS, PAGE, SCRIPT, write_page
from packlight.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is told of trials: see `packlight.trials.records`, which this folder knows by its attributes.
Record = Any
Study = Any


def write_trials_report(directory: str | Path, study: Study, title: str) -> Path:
    """Write `index.html` into a directory and return its path.

    Args:
        directory: made if it is not there.
        study: of `packlight.trials.search`.
        title: what was searched.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the directory cannot be written.
    """
    records = list(study.records.values())
    judged = [r for r in records if r.error is not None and r.planned and r.same_as is None]
    body = [_tiles(study)]
    if judged:
        svg = to_svg(
            error_against_costs(judged), "error-against-costs",
            "Validation error of each trial against its planned peak and its seconds.",
        )
        body.append(
            "<section><h2>Error against peak and time</h2><p class=note>Trials that no other one "
            f"beats in both are joined.</p><figure>{svg}</figure></section>"
        )
    if study.importances:
        svg = to_svg(
            importance_bars(study.importances), "importances",
            "How much each parameter matters for the error.",
        )
        body.append(
            "<section><h2>What the error depends on</h2><p class=note>PED-ANOVA over complete "
            f"trials; shares add up to one.</p><figure>{svg}</figure></section>"
        )
    if len(judged) > 1:
        svg = to_svg(
            parallel_coordinates(judged), "parallel-coordinates",
            "Each trial as a line through its values; the best ones stand out.",
        )
        body.append(f"<section><h2>Points</h2><figure>{svg}</figure></section>")
    body.append(f"<section><h2>Trials</h2>{_trial_table(records, study.best)}</section>")
    rest = [r for r in records if r.why and r.same_as is None]
    if rest:
        body.append(
            "<section><h2>What did not fit or did not end, and why</h2>"
            f"{_reason_table(rest)}</section>"
        )
    page = PAGE.format(
        title=escape(title), css=css_variables() + CSS, body="\n".join(body), script=SCRIPT,
        facts=f"{format_bytes(study.memory_bytes)} for all processes, of which "
        f"{format_bytes(study.step_bytes)} for steps",
    )
    return write_page(page, directory)


def front(records: Sequence[Record], cost: Callable[[Record], float]) -> list[Record]:
    """Return the records that no other one beats in cost and error, the cheapest first."""
    found: list[Record] = []
    for record in sorted(records, key=lambda r: (cost(r), r.error)):
        if not found or record.error < found[-1].error:
            found.append(record)
    return found


def error_against_costs(records: Sequence[Record]) -> Figure:
    """Return two panels: error against planned peak, and against seconds."""
    costs: list[tuple[str, Callable[[Record], float]]] = [
        ("planned peak, MiB", lambda r: float(r.planned.peak_bytes / 2**20)),
        ("seconds of training", lambda r: float(r.seconds)),
    ]
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.0, 3.6))
        for place, (name, cost) in enumerate(costs):
            axes = figure.add_axes((0.075 + 0.48 * place, 0.14, 0.42, 0.76))
            axes.plot([cost(r) for r in records], [r.error for r in records], linestyle="none",
                      marker="o", markersize=5, color=LIGHT["plain"])  # fmt: skip
            best = front(records, cost)
            axes.plot([cost(r) for r in best], [r.error for r in best], marker="o", markersize=6,
                      linewidth=1.5, color=LIGHT["planned"])  # fmt: skip
            axes.set_xlabel(name)
            if not place:
                axes.set_ylabel("validation error")
    return figure


def importance_bars(importances: dict[str, float]) -> Figure:
    """Return a bar for each parameter."""
    names = list(importances)[::-1]
    height = 0.5 + 0.32 * len(names)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.0, height))
        axes = figure.add_axes((0.2, 0.3 / height, 0.75, 1 - 0.4 / height))
        axes.barh(names, [importances[name] for name in names], color=LIGHT["planned"])
        axes.set_xlim(0, 1)
        axes.grid(False)
    return figure


def parallel_coordinates(records: Sequence[Record]) -> Figure:
    """Return a line for each trial through its values by rank; the best third stands out."""
    names = sorted({name for record in records for name in record.point})
    columns = [*names, "error"]
    places = {name: _places([_value(r, name) for r in records]) for name in columns}
    ordered = sorted(range(len(records)), key=lambda i: -records[i].error)
    num_dim = len(ordered) - max(1, len(ordered) // 3)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.0, 3.8))
        axes = figure.add_axes((0.05, 0.12, 0.9, 0.78))
        for rank, index in enumerate(ordered):
            is_best = rank >= num_dim
            axes.plot(range(len(columns)), [places[name][index] for name in columns],
                      color=LIGHT["planned"] if is_best else LIGHT["resident"],
                      linewidth=1.4 if is_best else 0.9)  # fmt: skip
        for place, name in enumerate(columns):
            axes.axvline(place, color=LIGHT["rule"], linewidth=0.8)
            values = [_value(r, name) for r in records]
            low, high = _ends(values)
            axes.text(place, -0.05, low, ha="center", va="top", color=LIGHT["muted"])
            axes.text(place, 1.03, high, ha="center", va="bottom", color=LIGHT["muted"])
        axes.set_xticks(range(len(columns)), columns)
        axes.tick_params(axis="x", pad=14, length=0)
        axes.set_yticks([])
        axes.set_ylim(-0.02, 1.02)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _value(record: Record, name: str) -> Any:
    return record.error if name == "error" else record.point.get(name)


def _sorted_values(values: Sequence[Any]) -> list[Any]:
    """Return the distinct values in order, numbers before words."""
    return sorted(set(values), key=lambda v: (isinstance(v, str) or v is None, v if v is not None
                                              and not isinstance(v, str) else 0, str(v)))


def _places(values: Sequence[Any]) -> list[float]:
    """Return where on an axis from 0 to 1 values lie, by rank."""
    distinct = _sorted_values(values)
    return [distinct.index(v) / max(1, len(distinct) - 1) for v in values]


def _ends(values: Sequence[Any]) -> tuple[str, str]:
    distinct = _sorted_values(values)
    return _text(distinct[0]), _text(distinct[-1])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tiles(study: Study) -> str:
    best, records = study.best, list(study.records.values())
    counts: dict[str, int] = {}
    for record in records:
        counts[record.outcome.value] = counts.get(record.outcome.value, 0) + 1
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    tiles = [("trials", str(len(records)), told)]
    if best is not None:
        point = ", ".join(f"{name} {_text(value)}" for name, value in best.point.items())
        tiles.append(("least error", f"{best.error:.4g}", f"trial {best.number}: {point}"))
        if best.planned is not None:
            tiles.append((
                "its peak", format_bytes(best.planned.peak_bytes),
                f"{best.planned.slowdown:.2f} x the plain step's time",
            ))  # fmt: skip
    shown = "".join(
        f"<div><span>{escape(a)}</span><b>{escape(b)}</b><small>{escape(c)}</small></div>"
        for a, b, c in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _trial_table(records: Sequence[Record], best: Record | None) -> str:
    names = sorted({name for record in records for name in record.point})
    heads = ["trial", "ended", *names, "planned peak", "measured", "slowdown", "time", "error"]
    rows = [[
        number_cell(r.number, str(r.number)),
        Cell(escape(r.outcome.value if r.same_as is None else f"as {r.same_as}"), is_text=True),
        *(_point_cell(r.point.get(name)) for name in names),
        bytes_cell(r.planned.peak_bytes) if r.planned else Cell("–", 0),
        bytes_cell(r.measured_peak_bytes) if r.measured_peak_bytes else Cell("–", 0),
        number_cell(r.planned.slowdown, f"{r.planned.slowdown:.2f}") if r.planned else Cell("–", 0),
        seconds_cell(r.seconds),
        Cell("–", 1e300) if r.error is None else number_cell(r.error, f"{r.error:.4g}"),
    ] for r in records]  # fmt: skip
    marked = records.index(best) if best is not None else None
    return sortable_table(heads, rows, marked=marked)


def _point_cell(value: Any) -> Cell:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_cell(value, _text(value))
    return Cell(escape("–" if value is None else str(value)), is_text=True)


def _reason_table(records: Sequence[Record]) -> str:
    rows = [[
        number_cell(r.number, str(r.number)),
        Cell(escape(r.outcome.value), is_text=True),
        Cell(escape(", ".join(f"{n} {_text(v)}" for n, v in r.point.items())), is_text=True),
        bytes_cell(r.smallest_bytes) if r.smallest_bytes else Cell("–", 0),
        Cell(escape(r.why), is_text=True),
    ] for r in records]  # fmt: skip
    return sortable_table(("trial", "ended", "point", "smallest step", "why"), rows)
