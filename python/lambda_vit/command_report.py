"""`lambda-vit report`: the report of a fine-tuning, made again from what is in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_options import app, make_console


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What --out of finetune was.", show_default=False)],
) -> None:
    """Write the report of a fine-tuning from its log: while it goes on, or after it was killed."""
    from .report import console_summary, write_report
    from .training_record import training_record

    record = training_record(folder)
    paths = write_report(record, folder)
    console = make_console()
    console.print(console_summary(record))
    console.print(f"Written: {paths['html']}", soft_wrap=True)
