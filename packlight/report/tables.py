"""Tables of the report: cells that sort by value, and headings to sort by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from packlight.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Cell:
    """What a table shows, what it sorts by if that is a number, and whether it reads as text."""

    html: str
    value: float | None = None
    is_text: bool = False


def bytes_cell(num_bytes: int) -> Cell:
    """Return bytes in the unit that reads best."""
    return Cell(format_bytes(num_bytes), num_bytes)


def seconds_cell(seconds: float) -> Cell:
    """Return seconds in the unit that reads best, a dash for none."""
    return Cell(format_seconds(seconds) if seconds else "–", seconds)


def number_cell(value: float, text: str) -> Cell:
    """Return a number as it should be shown."""
    return Cell(text, value)


def code(name: str) -> str:
    """Return a name that a narrow column breaks after its dots and underscores."""
    return f"<code>{re.sub(r'(?<=[._])(?=[^._])', '<wbr>', escape(name))}</code>"


def sortable_table(
    heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, marked: int | None = None
) -> str:
    """Return a table whose headings are buttons that sort it, see `template.SCRIPT`.

    Args:
        heads: one per column.
        rows: one cell per column each.
        marked: the row to highlight.
    """
    numeric = [
        bool(rows) and all(row[c].value is not None and not row[c].is_text for row in rows)
        for c in range(len(heads))
    ]
    head = "".join(
        f'<th scope="col"{" class=n" if numeric[c] else ""}>'
        f'<button type="button">{escape(name)}</button></th>'
        for c, name in enumerate(heads)
    )
    body = []
    for position, row in enumerate(rows):
        cells = "".join(
            f"<td{' class=n' if numeric[c] else ''}"
            + ("" if cell.value is None else f' data-v="{cell.value!r}"')
            + f">{cell.html}</td>"
            for c, cell in enumerate(row)
        )
        body.append(f"<tr{' class=marked' if position == marked else ''}>{cells}</tr>")
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
