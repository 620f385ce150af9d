"""The typer application: the order of its commands, its console, and how a command fails."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from lambda_kernels.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

ORDER = (
    "demo",
    "profile",
    "frequency",
    "select",
    "plan",
    "finetune",
    "report",
    "convert",
    "validate",
    "export",
    "import-ref",
    "doctor",
)


class _InOrder(TyperGroup):
    """Lists commands in the order of work, whichever module was imported first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    cls=_InOrder,
    help="Find the attention layers that a vision transformer does not need, remove them, and recover the accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def make_console() -> Console:
    from rich.console import Console

    # Paths and model names are printed as they are: brackets in them are no markup.
    return Console(highlight=False, markup=False)


def write_results(
    console: Console,
    record: dict[str, Any],
    out: Path | None,
    plot: Path | None = None,
    save_plot: Callable[[Path, dict[str, Any]], object] | None = None,
) -> None:
    """Write a record to `out` and its figure to `plot`, as far as they are named, and print the names."""
    if out is not None:
        write_json(out, record)
    if plot is not None and save_plot is not None:
        save_plot(plot, record)
    for written in filter(None, (out, plot)):
        console.print(f"Written: {written}", soft_wrap=True)


def print_next(console: Console, *arguments: object) -> None:
    console.print(f"Next: lambda-vit {shlex.join(map(str, arguments))}", soft_wrap=True)


class FailureError(RuntimeError):
    """The command did its work, and the outcome is a failure."""
