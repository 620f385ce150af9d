"""The files that commands write beside what they print: which ones there are, and figures as their bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

# What would differ from one picture of a record to the next.
_STAMPS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}


def plot_format(path: str | Path) -> str:
    """The kind of picture that the suffix of `path` names: "png", "svg" or "pdf".

    Raises:
        ValueError: It is another one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise ValueError(f"a plot is a file that ends in {', '.join(PLOT_SUFFIXES)}; got {str(path)!r}")
    return suffix[1:]


def encode(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as "png" (200 dpi), "svg" or "pdf", on white."""
    target = io.BytesIO()
    figure.savefig(target, format=kind, dpi=200, facecolor="white", metadata=_STAMPS[kind])
    return target.getvalue()
