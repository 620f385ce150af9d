"""The files that commands write beside what they print: which ones there are, and figures as their bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lambda_kernels.files import check_writable

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

# What would differ from one picture of a record to the next.
_STAMPS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}


def check_outputs(out: Path | None, plot: Path | None = None) -> None:
    """Raise before the work whose results could not be written: a record to `out`, a figure to `plot`.

    Raises:
        ValueError: A suffix does not fit, or a path is a folder.
        OSError: A place cannot be written to.
    """
    if plot is not None:
        plot_format(plot)
    if out is not None and out.suffix.lower() in PLOT_SUFFIXES:
        raise ValueError(f"--out writes JSON; got {str(out)!r}. A figure is drawn with --plot")
    for path in filter(None, (out, plot)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        check_writable(path)


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
