"""`lambda-vit import-ref`: reads a checkpoint that was released with the paper, and saves it as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .command_options import app, make_console, parse_indices, print_next


@app.command("import-ref")
def import_ref(
    file: Annotated[Path, typer.Argument(help="For example base_01346.pth.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.", show_default=False)],
    remove: Annotated[
        str, typer.Option(help="Blocks without attention, if the file's name does not say.", show_default=False)
    ] = "",
    architecture: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="timm's name of the full model, if it is not the DeiT of that width.", show_default=False),
    ] = None,
) -> None:
    """Turn a released checkpoint of the paper into a folder that the other commands read. Runs no code out of the file."""
    from lambda_kernels import save_pretrained
    from lambda_kernels.files import check_writable
    from lambda_kernels.published import RESIDUAL_SCALE, load_released

    from . import progress

    indices = parse_indices(remove, "--remove") if remove else None
    check_writable(out / "config.json")
    with progress.shown(), progress.task(f"Read {file}", 1) as advance:
        found = load_released(file, remove=indices, architecture=architecture)
        save_pretrained(found.model, out)
        advance()
    console = make_console()
    for line in _lines(found, RESIDUAL_SCALE):
        console.print(line, soft_wrap=True)
    console.print(f"Written: {out}/", soft_wrap=True)
    print_next(console, "validate", "--model", out, "--data", "path/to/imagenet")


def _lines(found: Any, scale: float) -> list[str]:
    blocks = ", ".join(map(str, found.removed)) or "none"
    parameters = sum(p.numel() for p in found.model.parameters())
    lines = [
        f"Architecture: {found.architecture} (from {found.architecture_from}), {found.model.num_classes} classes",
        f"Without attention: blocks {blocks} (from {found.removed_from}); residual scale {scale:g}",
        f"Parameters: {parameters:,}",
    ]
    if found.dropped:
        lines.append(f"Left out: {len(found.dropped)} tensors of removed attention that were still in the file")
    if found.others:
        lines.append(f"Not read: {', '.join(found.others)}")
    if found.published is not None:
        old, new = found.published.top1
        lines.append(
            f"Published top-1 on ImageNet-1k: {old:.2f} % (torch 1.7.1), {new:.2f} % (torch 1.12.1); not measured here"
        )
    return lines
