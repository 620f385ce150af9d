"""The report's figures: what every pick does, entropy by block, selection scores, accuracy of the variants, loss curves.

Every figure has the same width and takes the height its content needs; text sizes are then the same in all of them, for
6 blocks and for 32.
"""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

from ..records.readings import baseline, digits_of
from . import layers as profile_figures
from . import selection, training
from .style import MUTED, PALETTE, PAPER, PICK, SERIES, Plot, new_figure


def plots(record: dict[str, Any]) -> list[Plot]:
    """The figures that this record has data for, in reading order."""
    found = [plot] if (plot := selection.trajectory_plot(record)) else []
    if (record.get("profile") or {}).get("blocks"):
        height = profile_figures.by_block_height(record["profile"])
        found.append(Plot("entropy", "Entropy by block", height, _draw_entropy))
    found += [plot] if (plot := selection.score_plot(record)) else []
    measured = [v for v in record.get("variants") or () if v.get("top1") is not None]
    if measured:
        lines = sum(0.32 + 0.15 * _wrap(v["label"]).count("\n") for v in measured)
        found.append(Plot("variants", "Top-1 accuracy of the variants", 1.1 + lines, _draw_variants))
    found += [plot] if (plot := training.course_plot(record)) else []
    return found


def to_svg(plot: Plot, record: dict[str, Any], description: str) -> str:
    """The figure as an `<svg>` element inside an HTML page, with `description` as its alternative text."""
    with new_figure(plot.height) as figure:
        plot.draw(figure, record)
        target = io.BytesIO()
        figure.savefig(target, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue().decode(), plot.name, description)


def to_png(record: dict[str, Any]) -> bytes:
    """All figures of the record in one picture, the title on top; the title alone if there is nothing to draw."""
    drawn = plots(record)
    title = textwrap.fill(textwrap.shorten(record.get("title") or "Report", 200, placeholder=" …"), 66)
    heights = [0.3 + 0.26 * (title.count("\n") + 1), *(plot.height + 0.35 for plot in drawn)]
    with new_figure(sum(heights)) as figure:
        head, *rest = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        head.text(0.015, 0.5, title, fontsize=14, fontweight="bold", va="center")
        for plot, part in zip(drawn, rest, strict=True):
            part.suptitle(plot.title, x=0.015, ha="left", fontsize=11, fontweight="bold")
            plot.draw(part, record)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, facecolor="white")
    return target.getvalue()


def _inline(svg: str, name: str, description: str) -> str:
    """Makes a stand-alone SVG document an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    # Identifiers are one name space per page, and matplotlib starts from "figure_1" every time.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for role, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{role})")
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), ('"', "&quot;")):
        description = description.replace(char, entity)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _wrap(label: str, width: int = 30, lines: int = 3) -> str:
    return "\n".join(textwrap.wrap(label, width, max_lines=lines, placeholder=" …") or [""])


def _draw_entropy(figure: Any, record: dict[str, Any]) -> None:
    order = {layer: n for n, layer in enumerate((record.get("selection") or {}).get("layers") or (), 1)}
    profile_figures.draw_by_block(figure, record["profile"], order)


def _draw_variants(figure: Any, record: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    rows = [v for v in record["variants"] if v.get("top1") is not None]
    digits = digits_of(record)
    axes = figure.subplots()
    full = baseline(record)
    if full in rows:
        if full.get("top1_interval"):
            axes.axvspan(*full["top1_interval"], color=MUTED, alpha=0.13, linewidth=0)
        axes.axvline(full["top1"], color=MUTED, linewidth=1, linestyle="--")
    solid: dict[str, Any] = {"color": SERIES[0], "marker": "o", "markersize": 7, "linewidth": 2}
    hollow = solid | {"color": PICK, "marker": "D", "markerfacecolor": PAPER, "markeredgewidth": 1.6}
    looks = ((True, "trained", solid), (False, "not trained", hollow))
    for y, row in enumerate(rows):
        look = solid if row.get("trained") else hollow
        if row.get("top1_interval"):
            axes.plot(row["top1_interval"], [y, y], color=look["color"], linewidth=2, solid_capstyle="butt")
        axes.plot(row["top1"], y, **look)
        axes.annotate(f"{row['top1']:.{digits}f}", (1, y), (36, 0), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", ha="right", va="center")  # fmt: skip
    axes.set_yticks(range(len(rows)), [_wrap(v["label"]) for v in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0), high)
    axes.set_xlabel("top-1 (%), with its 95 % interval")
    kinds = {bool(row.get("trained")) for row in rows}
    handles = [Line2D([], [], label=label, **look) for trained, label, look in looks if trained in kinds]
    if full in rows:
        label = "full model" if full["name"] == "full" else "reference"
        handles.append(Line2D([], [], color=MUTED, linewidth=1, linestyle="--", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
