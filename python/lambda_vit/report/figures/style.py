"""What all figures share: width, colours, fonts, and how one is made.

Drawn through matplotlib's object API on the Agg and SVG canvases: no pyplot, no window, and a style context, so that
neither a display nor the reader's own matplotlibrc changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH = 7.6  # inches

# role: (light, dark). Figures are drawn in the light colours; in the SVG each becomes a CSS variable, so that the
# page's colour scheme decides. Series colours follow Okabe and Ito: apart for every common kind of colour blindness.
PALETTE = {
    "ink": ("#1b2026", "#e7eaee"),
    "muted": ("#59626c", "#a3adb8"),
    "grid": ("#dfe3e8", "#363d46"),
    "paper": ("#fefefe", "#14181d"),
    "off": ("#e9ecf0", "#262c34"),
    "pick": ("#d55e00", "#ff8a3d"),
    "series-0": ("#0072b2", "#5ab4ec"),
    "series-1": ("#009e73", "#3fcf9f"),
    "series-2": ("#cc79a7", "#e79cc4"),
    "series-3": ("#b8860b", "#e6b432"),
    "series-4": ("#4b3f94", "#a79bf0"),
    "series-5": ("#7a4a1e", "#cf9a68"),
}
INK, MUTED, GRID, PAPER, OFF, PICK, *SERIES = (light for light, _ in PALETTE.values())

_STYLE = {
    "font.family": "DejaVu Sans",  # ships inside matplotlib: the same widths everywhere
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a label is a dollar
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "pdf.fonttype": 42,  # TrueType, which printers and editors take
    "svg.fonttype": "path",  # the page brings no font of its own, and text set in another one would overlap
    "svg.hashsalt": "lambda-vit",  # or ids would change from one picture of a record to the next
}


@dataclass(frozen=True)
class Plot:
    """One figure: `draw(figure, record)` fills a matplotlib Figure or SubFigure that is `height` inches high."""

    name: str
    title: str
    height: float
    draw: Callable[[Any, dict[str, Any]], None]


@contextmanager
def new_figure(height: float) -> Iterator[Any]:
    """A figure of full width, `height` inches high, in this style."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def known(rows: Iterable[Mapping[str, Any]], key: str) -> bool:
    """Whether a row has a value under `key`."""
    return any(row.get(key) is not None for row in rows)


def numbers(values: list[float | None]) -> list[float]:
    """NaN where there is none: matplotlib leaves a gap."""
    return [math.nan if v is None else v for v in values]


def shortened(name: str, most: int = 44) -> str:
    """`name` in at most `most` characters, without its middle: the end of a path and the start of a name identify it."""
    half = (most - 2) // 2
    return name if len(name) <= most else f"{name[:half]} … {name[1 - half :]}"
