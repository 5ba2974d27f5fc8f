"""One model's picture: what each tool holds against how long it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.common import MEBIBYTE
from benchmarks.peers.front import front
from benchmarks.peers.ours import ALL_ROW, BACKEND, EXACT_ROW
from benchmarks.peers.records import EAGER, Record
from benchmarks.peers.rivals import (
    AUTOCAST,
    CHECKPOINT,
    HOOKS,
    IN_BACKWARD,
    INDUCTOR,
    MEMORY_BUDGET,
    MICROBATCHES,
    ROCKMATE,
    SELECTIVE,
    SEQUENTIAL,
)
from packlight.report.style import LIGHT, drawing

# tool: marker and colour; what is not named here is another library's optimizer.
STYLES = {
    CHECKPOINT: ("s", "budget"),
    SELECTIVE: ("D", "allocated"),
    SEQUENTIAL: ("^", "optimizer"),
    MEMORY_BUDGET: ("v", "bound"),
    INDUCTOR: ("X", "muted"),
    ROCKMATE: ("8", "bound"),
    HOOKS: ("P", "batch"),
    IN_BACKWARD: ("h", "parameters"),
    MICROBATCHES: ("*", "parameters"),
    AUTOCAST: ("d", "muted"),
}
OTHER_STYLE = ("p", "optimizer")
# Packlight's lines: what they may change, how they are drawn.
LINES = (
    ("Packlight, exact", (EXACT_ROW.tool, BACKEND), "-", 1.8),
    ("Packlight, all moves", (EXACT_ROW.tool, BACKEND, ALL_ROW.tool), "--", 1.3),
    ("Packlight with 8 bits, bf16 or disk", None, ":", 1.3),
)
# What takes longer is drawn at the upper edge with its time.
CEILING = 2.2
LABEL_POINTS = 6.5
# Where a label may stand beside its point, in points.
PLACES = [
    (x * distance, y * distance)
    for distance in (6, 13, 22, 33)
    for x, y in ((1, 0.3), (-1, 0.3), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def plot(records: Sequence[Record]) -> Any:
    """Return a figure of one model: peak against time ratio."""
    with drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(9.2, 5.4))
        axes = figure.add_axes((0.075, 0.1, 0.905, 0.68))
        eager = next(r for r in records if r.tool == EAGER)
        ours = [r for r in records if r.is_ours and r.was_timed]
        rivals = [r for r in records if not r.is_ours and r.tool != EAGER and r.was_timed]
        right = 1.04 * max(_mebibytes(r) for r in (eager, *ours, *rivals))
        top = min(CEILING, 1.08 * max(_shown_at_most(r) for r in (eager, *ours, *rivals)))
        bottom = min(0.95, 0.96 * min(r.ratio for r in (eager, *ours, *rivals)))
        axes.set_xlim(0, right)
        axes.set_ylim(bottom, top)
        for label, tools, style, width in LINES:
            mine = [r for r in ours if tools is None or r.tool in tools]
            _steps(axes, front(mine), (right, top), label, style, width)
        axes.plot(
            [_mebibytes(eager)], [1.0], "o", color=LIGHT["ink"], markersize=8, label=EAGER, zorder=5
        )
        for tool, found in _by_tool(rivals).items():
            marker, colour = STYLES.get(tool, OTHER_STYLE)
            axes.plot(
                [_mebibytes(r) for r in found], [min(r.ratio, top) for r in found], marker,
                color=LIGHT[colour], label=tool, markersize=6.5, zorder=4, clip_on=False,
                markeredgecolor=LIGHT["surface"], markeredgewidth=0.5, linestyle="none",
            )
        axes.axhline(1.0, color=LIGHT["rule"], linewidth=0.8, zorder=1)
        axes.set_xlabel("measured peak of the whole step, everything counted, MiB")
        axes.set_ylabel("time of a step over eager's")
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.065, 0.955), ncols=4, fontsize=7.5,
            columnspacing=1.4, handletextpad=0.5,
        )
        figure.text(0.075, 0.96, eager.title, fontsize=9.5, fontweight="bold")
        _label(figure, axes, rivals, [*ours, eager], top)
    return figure


def _steps(
    axes: Any, cells: list[Record], corner: tuple[float, float], label: str, style: str,
    width: float,
) -> None:
    """Draw what is reached at each peak: the fastest cell that holds no more."""
    if not cells:
        return
    right, top = corner
    xs = [*(_mebibytes(r) for r in cells), right]
    ys = [min(ratio, top) for ratio in (*(r.ratio for r in cells), cells[-1].ratio)]
    axes.plot(
        xs, ys, style, drawstyle="steps-post", color=LIGHT["planned"], linewidth=width, label=label,
        zorder=3, alpha=0.9,
    )
    axes.plot(
        xs[:-1], ys[:-1], "o", color=LIGHT["planned"], markersize=3.5, zorder=3, clip_on=False
    )


def _by_tool(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.tool, []).append(record)
    return found


def _label(
    figure: Any, axes: Any, rivals: list[Record], others: list[Record], top: float
) -> None:
    """Name each rival's setting beside its point, where no other label or point is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    pixels = figure.dpi / 72
    taken = []
    for record in (*rivals, *others):
        x, y = axes.transData.transform((_mebibytes(record), min(record.ratio, top)))
        radius = 4 * pixels
        taken.append(Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius))
    first = front(rivals)
    above = [r for r in others if r.ratio > top]  # where Packlight's lines leave the picture
    for record in (*above, *sorted(rivals, key=lambda r: (r not in first, r.peak_bytes))):
        text = _words(record) + (f" ({record.ratio:.1f}x)" if record.ratio > top else "")
        point = (_mebibytes(record), min(record.ratio, top))
        for offset in PLACES:
            note = axes.annotate(
                text, point, offset, textcoords="offset points", fontsize=LABEL_POINTS,
                color=LIGHT["muted"], zorder=6, va="center",
                ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
                arrowprops={
                    "arrowstyle": "-", "color": LIGHT["plain"], "linewidth": 0.5, "shrinkB": 3,
                    "shrinkA": 0,
                } if abs(offset[0]) + abs(offset[1]) > 15 else None,
            )
            box = note.get_window_extent(renderer)
            box = _text_box(note, renderer, box)
            is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4 and frame.y0 <= box.y0
            if is_inside and box.y1 <= frame.y1 + 12 * pixels and not box.count_overlaps(taken):
                taken.append(box)
                break
            note.remove()


def _text_box(note: Any, renderer: Any, box: Any) -> Any:
    """Return where an annotation's text is, without its line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer) or box


def _words(record: Record) -> str:
    """Return a rival's setting, short; of Packlight's row its name."""
    words = record.tool if record.is_ours else record.setting or record.tool
    if record.tool == MICROBATCHES:
        words += f" {MICROBATCHES}"
    for long, short in (
        ("every second block", "every 2nd"), ("matmul and attention saved", "matmul, attention"),
        (f"{MEMORY_BUDGET} ", "budget "), (" and ", " + "),
    ):
        words = words.replace(long, short)
    return words


def _shown_at_most(record: Record) -> float:
    return min(record.ratio, CEILING)


def _mebibytes(record: Record) -> float:
    return (record.peak_bytes or 0) / MEBIBYTE
