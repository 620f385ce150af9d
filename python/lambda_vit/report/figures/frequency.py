"""The figure of feature frequencies, after figures 2 and 8 of arXiv 2202.06709: spectra by block, and what changed.

Drawn from a record as `frequency_table` shows it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records.readings import CLEAR, at, subject, verdict
from .files import Part, render_page, save_page
from .style import INK, MUTED, PAPER, PICK, SERIES, shortened

# From the first block to the last, darker and darker: the order stays visible without colour.
_DEPTH = ("#e0a10f", SERIES[0], INK)
_LABEL = "Δ log amplitude (natural log)"


def save_plot(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write the figure of a record, atomically.

    Args:
        path: Ends in .png, .svg or .pdf.
        record: {"model": name, "before": …}, with "after" and "changes" for a comparison.

    Raises:
        ValueError: The suffix is another one.
        OSError: The file cannot be written.
    """
    save_page(path, lambda kind: render(record, kind))


def render(record: Mapping[str, Any], kind: str) -> bytes:
    """Draw the figure as "png", "svg" or "pdf"."""
    parts: list[Part] = [("Spectra of the blocks' outputs", 3.0, lambda part: draw_spectra(part, record))]
    if record.get("after") is not None:
        parts.append(("Change from before to after", 3.0, lambda part: draw_changes(part, record)))
    else:
        parts.append(("By block", 2.6, lambda part: draw_levels(part, record)))
    title = f"Features by frequency: {shortened(str(record['model']), 40)}"
    return render_page(kind, title, _facts(record), parts, _notes(record))


def draw_spectra(figure: Any, record: Mapping[str, Any]) -> None:
    """Fill `figure` with Δ log amplitude against frequency, a line per block; before and after on one scale."""
    parts = [("before", record["before"])]
    if record.get("after"):
        parts.append(("after", record["after"]))
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (title, part) in zip(panels, parts, strict=True):
        lines = {row["block"]: row["relative"] for row in part["blocks"]}
        _draw_lines(axes, record, lines, set(part["removed"]))
        if len(parts) > 1:
            axes.set_title(title.capitalize(), loc="left", fontsize=9, fontweight="bold", pad=6)
    panels[0].set_ylabel(_LABEL)
    _depth_bar(figure, panels, len(record["before"]["blocks"]))


def draw_changes(figure: Any, record: Mapping[str, Any]) -> None:
    """Fill `figure` with the change of Δ log amplitude: by frequency, a line per block, and by block."""
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
    gone = set(record["after"]["removed"])
    _draw_lines(left, record, {row["block"]: row["relative"] for row in record["changes"]}, gone)
    left.set_ylabel(f"change of {_LABEL}".replace(" (", "\n("))
    _draw_by_block(right, record, record["changes"], gone)
    for axes in (left, right):
        axes.axhline(0, color=MUTED, linewidth=0.9, zorder=1)


def draw_levels(figure: Any, record: Mapping[str, Any]) -> None:
    """Fill `figure` with Δ log amplitude of one model by block."""
    axes = figure.subplots()
    _draw_by_block(axes, record, record["before"]["blocks"], set(record["before"]["removed"]))
    axes.set_ylabel(_LABEL)


def _colour(block: int, depth: int) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depth", _DEPTH)(block / max(1, depth - 1))


def _draw_lines(axes: Any, record: Mapping[str, Any], lines: Mapping[int, list[float]], gone: set[int]) -> None:
    before = record["before"]
    shown = slice(0, before["highest"] + 1)
    for block, values in lines.items():
        dashes = (0, (3, 1.5)) if block in gone else "-"
        look = {
            "color": _colour(block, len(lines)),
            "linestyle": dashes,
            "linewidth": 1.3,
            "marker": "o",
            "markersize": 2.5,
        }
        axes.plot(before["frequencies"][shown], values[shown], **look)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼ π", "½ π", "¾ π", "π"])
    axes.set_xlim(-0.02, 1.03)
    axes.set_xlabel("radial frequency (rad per token)")


def _depth_bar(figure: Any, panels: Any, depth: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm([i - 0.5 for i in range(depth + 1)], depth)
    colours = ListedColormap([_colour(block, depth) for block in range(depth)])
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(panels), pad=0.015, aspect=24)
    bar.set_ticks(range(0, depth, math.ceil(depth / 12)))
    bar.minorticks_off()
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)
    bar.set_label("block")


def _draw_by_block(axes: Any, record: Mapping[str, Any], rows: list[Mapping[str, Any]], gone: set[int]) -> None:
    from matplotlib.patches import Patch

    highest = record["before"]["highest"]
    points = {
        f"at {at(record)}": [(row["relative"][highest], row["relative_error"][highest]) for row in rows],
        f"mean over (0, {at(record)}]": [(row["mean"], row["mean_error"]) for row in rows],
    }
    blocks = [row["block"] for row in record["before"]["blocks"]]
    for block in gone:
        axes.axvspan(block - 0.45, block + 0.45, color=PICK, alpha=0.13, linewidth=0)
    looks = ({"marker": "o", "markerfacecolor": SERIES[0]}, {"marker": "s", "markerfacecolor": PAPER})
    for shift, look, colour, (label, values) in zip((-0.14, 0.14), looks, SERIES, points.items(), strict=False):
        axes.errorbar(
            [block + shift for block in blocks],
            [value for value, _ in values],
            [CLEAR * error for _, error in values],
            color=colour,
            linestyle="",
            elinewidth=1.1,
            markersize=4.5,
            label=label,
            **look,
        )
    axes.grid(visible=False, axis="x")
    axes.set_xticks(blocks[:: math.ceil(len(blocks) / 14)])
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_xlabel("block")
    handles, _ = axes.get_legend_handles_labels()
    if gone:
        handles.append(Patch(color=PICK, alpha=0.25, linewidth=0, label="attention removed"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8, columnspacing=1.0,
                handletextpad=0.4, borderaxespad=0.1)  # fmt: skip


def _facts(record: Mapping[str, Any]) -> str:
    before = record["before"]
    what = subject(record).partition(" → ")[2]
    facts = [shortened(what, 60)] if what else []
    rows, columns = before["grid"]
    return " · ".join(
        [*facts, f"{before['samples']:,} images", f"{rows} × {columns} tokens, {before['channels']} channels"]
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    gone = (record.get("after") or record["before"])["removed"]
    notes = [
        f"Mean ln |F| over images, channels and directions, less that at frequency 0; up to {at(record)}, without the corners.",
        f"{'Dashed: attention removed. ' if gone else ''}Bars: ± {CLEAR:g} standard errors over the images.",
    ]
    if record.get("after"):
        notes += textwrap.wrap(verdict(record), 118)
    return notes
