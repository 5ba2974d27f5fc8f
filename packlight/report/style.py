"""Colours and type of figures and page: two themes, and SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from packlight.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name: (light, dark). Light values differ pairwise: `to_svg` finds them again in the drawing.
COLOURS = {
    "ink": ("#1c2126", "#e6e9ed"),
    "muted": ("#5b6570", "#9aa5b1"),
    "rule": ("#dfe3e8", "#2d343c"),
    "surface": ("#ffffff", "#15191e"),
    "page": ("#f6f7f9", "#0e1115"),
    "planned": ("#2563c9", "#6aa1f7"),
    "plain": ("#a9b2bd", "#65707c"),
    "resident": ("#d3d9e0", "#363e47"),
    "budget": ("#c2371e", "#f5866d"),
    "bound": ("#2b8a6e", "#5cc4a4"),
    "parameters": ("#5b84b1", "#7fa8d6"),
    "optimizer": ("#9270bf", "#b295dd"),
    "allocated": ("#e0953f", "#e8a95f"),
    "batch": ("#8a9a5b", "#aebd7d"),
    "accumulated": ("#c76b86", "#e08fa8"),
    "beside": ("#5f9ea0", "#86c0c2"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
# How far a figure may shrink: from 9 points, or 12 pixels, to 10.
LEAST_SCALE = 0.85
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


@contextmanager
def drawing() -> Iterator[Any]:
    """Set matplotlib's defaults for the time of one drawing; yield its module.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the report") from None
    settings: Any = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "text.color": LIGHT["ink"],
        "axes.edgecolor": LIGHT["rule"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.labelsize": 9.0,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": LIGHT["rule"],
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "ytick.major.size": 0.0,
        "xtick.major.size": 3.0,
        "figure.facecolor": LIGHT["surface"],
        "legend.frameon": False,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings):
        yield matplotlib


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an inline SVG element whose colours follow the page's theme.

    Args:
        figure: drawn with the light colours.
        name: unlike those of the page's other figures; it keeps their internal ids apart.
        description: for readers that cannot see it.
    """
    stream = io.StringIO()
    with drawing() as matplotlib, matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{colour})")
    # The page's own typeface; every fallback is narrower than the one that the layout was made for.
    svg = re.sub(r"(font: [^;\"]*?px) 'DejaVu Sans'[^;\"]*", r"\1 var(--sans)", svg)
    # matplotlib numbers groups from 1 in each figure; a page may hold an id only once.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    size = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)
    width_px = round(float(size.group(1)) * 96 / 72) if size else 960
    # Where the page is narrower than that, the figure scrolls: its words must stay legible.
    widths = f"min-width:{round(LEAST_SCALE * width_px)}px;max-width:{width_px}px"
    head = f'<svg role="img" aria-label="{description}" style="{widths}" '
    svg = re.sub(r'(<svg[^>]*?) width="[0-9.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[0-9.]+pt"', r"\1", svg, count=1)
    return svg.replace("<svg ", head, 1)


def css_variables() -> str:
    """Return the style rules that define both themes."""
    light = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
    dark = "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())
    return (
        f":root{{color-scheme:light dark;--sans:{SANS};{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
