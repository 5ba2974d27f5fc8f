"""The HTML page of a search for a small file: bytes against error, trials, layers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packlight.report.style import LIGHT, css_variables, drawing, to_svg
from packlight.report.tables import Cell, bytes_cell, code, number_cell, sortable_table
from packlight.report.template import CSS, PAGE, SCRIPT, write_page
from packlight.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trial(Protocol):
    """What is told of a trial; see `packlight.compress.search.Trial`."""

    @property
    def density(self) -> float: ...  # noqa: D102
    @property
    def num_values(self) -> int: ...  # noqa: D102
    @property
    def file_bytes(self) -> int: ...  # noqa: D102
    @property
    def error(self) -> float: ...  # noqa: D102


def write_compression_report(directory: str | Path, outcome: Any, title: str) -> Path:
    """Write `index.html` into a directory and return its path.

    Args:
        directory: made if it is not there.
        outcome: of `packlight.compress.search.search`.
        title: what was compressed.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the directory cannot be written.
    """
    best, trials = outcome.best, outcome.trials
    figure = error_against_bytes(trials, best, outcome.target_bytes, outcome.dense_error)
    svg = to_svg(figure, "error-against-bytes", "Error of each trial against its file's bytes.")
    tiles = [
        ("file", format_bytes(best.file_bytes), f"{best.file_bytes} bytes, everything in it"),
        ("smaller", f"{outcome.dense_bytes / best.file_bytes:.1f}x",
         f"than {format_bytes(outcome.dense_bytes)}"),
        ("error", f"{best.error:.4g}", f"{outcome.dense_error:.4g} before"),
    ]  # fmt: skip
    shown = "".join(
        f"<div><span>{escape(a)}</span><b>{escape(b)}</b><small>{escape(c)}</small></div>"
        for a, b, c in tiles
    )
    body = [
        f'<div class="tiles">{shown}</div>',
        f"<section><h2>Error against bytes</h2><figure>{svg}</figure>"
        f"{_trial_table(trials, best, outcome.dense_bytes)}</section>",
        f"<section><h2>The file, tensor by tensor</h2>{_tensor_table(outcome.report)}</section>",
    ]
    page = PAGE.format(
        title=escape(title), facts=f"target {format_bytes(outcome.target_bytes)}",
        css=css_variables() + CSS, body="\n".join(body), script=SCRIPT,
    )  # fmt: skip
    return write_page(page, directory)


def error_against_bytes(
    trials: Sequence[Trial], best: Trial, target_bytes: int, dense_error: float
) -> Figure:
    """Return the trials as points, those that no other beats joined by a line."""
    ordered = sorted(trials, key=lambda trial: (trial.file_bytes, trial.error))
    front: list[Trial] = []
    for trial in ordered:
        if not front or trial.error < front[-1].error:
            front.append(trial)
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.0, 3.6))
        axes = figure.add_axes((0.075, 0.14, 0.905, 0.74))
        axes.plot([t.file_bytes for t in front], [t.error for t in front], color=LIGHT["planned"],
                  linewidth=1.5, label="no other is smaller and better")  # fmt: skip
        axes.plot([t.file_bytes for t in ordered], [t.error for t in ordered], linestyle="none",
                  marker="o", markersize=5.5, color=LIGHT["planned"], label="trials")  # fmt: skip
        axes.plot([best.file_bytes], [best.error], linestyle="none", marker="o", markersize=13,
                  markerfacecolor="none", markeredgewidth=2.0, color=LIGHT["bound"],
                  label="kept")  # fmt: skip
        axes.axvline(target_bytes, color=LIGHT["budget"], linestyle=(0, (5, 2)), label="target")
        axes.axhline(dense_error, color=LIGHT["plain"], label="error before")
        axes.set_xlabel("bytes of the file")
        axes.set_ylabel("error")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=5)
    return figure


def _trial_table(trials: Sequence[Trial], best: Trial, dense_bytes: int) -> str:
    rows = [
        [
            number_cell(trial.num_values, str(trial.num_values)),
            number_cell(trial.density, f"{trial.density:.2%}"),
            number_cell(trial.file_bytes, str(trial.file_bytes)),
            number_cell(
                dense_bytes / trial.file_bytes, f"{dense_bytes / trial.file_bytes:.1f}x"
            ),
            number_cell(trial.error, f"{trial.error:.4g}"),
        ]
        for trial in trials
    ]
    heads = ("values", "weights kept", "bytes", "smaller", "error")
    return sortable_table(heads, rows, marked=list(trials).index(best))


def _tensor_table(report: Any) -> str:
    rows = []
    for tensor in report.tensors:
        is_few = tensor.num_nonzeros is not None
        rows.append([
            Cell(code(tensor.name), is_text=True),
            bytes_cell(tensor.dense_bytes),
            number_cell(tensor.num_nonzeros, str(tensor.num_nonzeros)) if is_few else Cell("–", 0),
            number_cell(tensor.num_values, str(tensor.num_values)) if is_few else Cell("–", 0),
            number_cell(tensor.file_bytes, str(tensor.file_bytes))
            if tensor.file_bytes is not None
            else Cell("–", 0),
        ])
    return sortable_table(("tensor", "dense", "not zero", "values", "bytes in the file"), rows)
