"""The entry point of `lambda-vit`, and the commands `demo` and `doctor`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.optional_packages import MissingPackageError
from . import analysis, conversion, export, planning, selection, training  # noqa: F401 (each registers its commands)
from .app import FailureError, app, make_console
from .options import Device


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder for the report and the model.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: Device = "cpu",
) -> None:
    """Run the whole method on scikit-learn's digits, from training to the comparison, in about two minutes."""
    from lambda_kernels.files import check_writable

    from .. import demo as module
    from ..runtime import environment, progress
    from .models import check_device

    console = make_console()
    check_writable(out / "report.html")
    console.print(f"lambda-vit demo, seed {seed}, writing to {out}/")
    for name, value in environment.versions().items():
        console.print(f"  {name:15} {value}", soft_wrap=True)
    options = module.DemoOptions(seed=seed, device=str(check_device(device)))
    with progress.progress_bars() as bars:
        result = module.run_demo(out, options, bars.console if bars.console.is_terminal else console)
    console.print(f"\nReport:  {out / 'report.html'}\nModel:   {out / 'model'}/")
    console.print("\nOn your own images:")
    for entry in result.record["next_commands"]:
        console.print(f"  # {entry['what']}\n  {entry['command']}", soft_wrap=True)
    if result.failures:
        raise FailureError("; ".join(result.failures))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """Print versions and devices, how the extension was built, and which backend each operator uses and why."""
    from rich.table import Table

    from lambda_kernels.ops.ln_mlp.fused import tuning

    from ..runtime import environment

    found: dict[str, Any] = {
        "versions": environment.versions(),
        "backends": environment.backends(),
        "tuning": tuning.status(),
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = make_console()
    for name, value in found["versions"].items():
        console.print(f"{name:15} {value}", soft_wrap=True)
    table = Table()
    for column in ("operator", "device", "dtype", "backend", "reason"):
        table.add_column(column, overflow="fold")
    for row in found["backends"]:
        table.add_row(*row.values())
    console.print(table)
    tuned = found["tuning"]
    console.print(f"tuning {tuned['switch']}, entries in {tuned['file']}: {len(tuned['entries'])}", soft_wrap=True)
    for entry in tuned["entries"]:
        times = ", ".join(f"{name} {time:.1f} µs" for name, time in entry["times_us"].items())
        console.print(f"  {entry['problem']}: {entry['candidate']} ({times})", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line. An expected error prints one line and exits with 2; LAMBDA_VIT_DEBUG=1 shows its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every terminal and pipe can show λ and →
    warnings.showwarning = _show_warning
    try:
        app()
    except FailureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, RuntimeError, OSError, MissingPackageError) as error:  # a TypeError is a fault of this program
        if os.environ.get("LAMBDA_VIT_DEBUG", "0") != "0":
            raise
        is_expected = isinstance(error, (ValueError, OSError, ImportError))
        hint = "" if is_expected else " (set LAMBDA_VIT_DEBUG=1 for a traceback)"
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
