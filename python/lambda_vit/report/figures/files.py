"""Figures as files of their own: their formats, and one page with a head, parts and notes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lambda_kernels.files import atomic_write

from .style import MUTED, new_figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

# Metadata that would differ between two pictures of one record.
_STAMPS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}

# A part of a page: its title, its height in inches, and what draws it into a matplotlib SubFigure.
Part = tuple[str, float, Callable[[Any], None]]


def plot_format(path: str | Path) -> str:
    """The format that the suffix of `path` names: "png", "svg" or "pdf"; ValueError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise ValueError(f"a plot is a file that ends in {', '.join(PLOT_SUFFIXES)}; got {str(path)!r}")
    return suffix[1:]


def save_page(path: str | Path, render: Callable[[str], bytes]) -> None:
    """Write `render(plot_format(path))` to `path`, atomically."""
    content = render(plot_format(path))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def render_page(kind: str, title: str, facts: str, parts: Sequence[Part], notes: Sequence[str]) -> bytes:
    """Draw a page for paper, light and 7.6 inches wide, as "png" (200 dpi), "svg" or "pdf"."""
    heights = [0.62, *(height for _, height, _ in parts), 0.2 + 0.16 * len(notes)]
    with new_figure(sum(heights)) as figure:
        head, *middle, foot = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        head.text(0.015, 0.68, title, fontsize=13, fontweight="bold", va="center")
        head.text(0.015, 0.22, facts, color=MUTED, va="center")
        for part, (name, _, draw) in zip(middle, parts, strict=True):
            part.suptitle(name, x=0.015, ha="left", fontsize=10.5, fontweight="bold")
            draw(part)
        foot.text(0.015, 0.95, "\n".join(notes), color=MUTED, fontsize=8, va="top", linespacing=1.35)
        target = io.BytesIO()
        figure.savefig(target, format=kind, dpi=200, facecolor="white", metadata=_STAMPS[kind])
        return target.getvalue()
