"""`lambda-vit convert`, `validate` and `import-ref`: smaller models, their comparison, and the paper's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, make_console, print_next, write_results
from .models import check_made_for, make_weights_options, read_layers
from .options import (
    BatchSize,
    ClassMap,
    Data,
    Device,
    JsonFile,
    Model,
    Pretrained,
    Remove,
    SelectionFile,
    SkipBad,
    Split,
    UseEma,
    Weights,
    Workers,
    check_outputs,
    open_data,
    parse_indices,
    print_bad,
)


@app.command("import-ref")
def import_ref(
    file: Annotated[Path, typer.Argument(help="Released checkpoint, such as base_01346.pth.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Output folder for config.json and model.safetensors.", show_default=False)],
    remove: Annotated[
        str,
        typer.Option(
            help="Indices of the blocks without attention, if the file name does not list them.", show_default=False
        ),
    ] = "",
    architecture: Annotated[
        str | None,
        typer.Option(help="timm name of the full model, if it is not the DeiT of the same width.", show_default=False),
    ] = None,
) -> None:
    """Convert a released checkpoint of the paper into a folder for the other commands. Runs no code from the file."""
    from lambda_kernels import save_pretrained
    from lambda_kernels.checkpoints.published import RESIDUAL_SCALE, load_released
    from lambda_kernels.files import check_writable

    from ..runtime import progress

    indices = parse_indices(remove, "--remove") if remove else None
    check_writable(out / "config.json")
    with progress.progress_bars(), progress.task(f"Read {file}", 1) as advance:
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
        lines.append(f"Omitted: {len(found.dropped)} tensors of removed attention that were still in the file")
    if found.others:
        lines.append(f"Not read: {', '.join(found.others)}")
    if found.published is not None:
        old, new = found.published.top1
        lines.append(
            f"Published top-1 on ImageNet-1k: {old:.2f} % (torch 1.7.1), {new:.2f} % (torch 1.12.1); not measured here"
        )
    return lines


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder for config.json and model.safetensors.", show_default=False)],
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    residual_scale: Annotated[
        float, typer.Option(help="Scale of the residual stream: 1 if attention is skipped, 2 if training diluted it.")
    ] = 1.0,
    tome_r: Annotated[
        str,
        typer.Option(help="Tokens to merge in each block with attention: one number, or one per block such as 8,6,4."),
    ] = "",
    tome_start: Annotated[
        int | None,
        typer.Option(help="First block with attention that merges tokens, counted from 0.", show_default="1"),
    ] = None,
) -> None:
    """Remove attention layers, or merge tokens, and save the smaller model."""
    from lambda_kernels import convert_vit, save_pretrained
    from lambda_kernels.files import check_writable

    from ..measure.comparison import kernel_paths, merging_lines
    from ..runtime import progress
    from .models import open_model

    merged = parse_indices(tome_r, "--tome-r") or None
    chosen = read_layers(selection, remove) if selection or remove or merged is None else ()
    check_writable(out / "config.json")
    with progress.progress_bars():
        network = open_model(model, weights=weights, use_ema=use_ema, pretrained=pretrained, device="cpu")
    if selection is not None and not isinstance(chosen, tuple):
        check_made_for(chosen, selection, network, model)
    before = sum(p.numel() for p in network.parameters())
    merging: dict[str, Any] = {"tome_r": merged[0] if merged and len(merged) == 1 else merged, "tome_start": tome_start}
    network = convert_vit(network, chosen, residual_scale=residual_scale, inplace=True, **merging)
    after = sum(p.numel() for p in network.parameters())
    save_pretrained(network, out, selection=chosen if selection is not None else None)
    console = make_console()
    removed = ", ".join(map(str, network.lambda_kernels_info.removed))
    console.print(
        f"Removed the attention of {f'blocks {removed}' if removed else 'no block'}: {before:,} → {after:,} parameters "
        f"(−{100 * (1 - after / before):.1f} %). Written: {out}/",
        soft_wrap=True,
    )
    for line in merging_lines(kernel_paths(network)):
        console.print(line, soft_wrap=True)
    own = make_weights_options("--reference-", weights, use_ema, pretrained)
    print_next(console, "validate", "--model", out, "--reference", model, *own, "--data", "path/to/images")


@app.command()
def validate(
    model: Model,
    data: Data,
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    reference: Annotated[str | None, typer.Option(help="Original model to compare with.", show_default=False)] = None,
    reference_weights: Annotated[
        Path | None,
        typer.Option(help="Weights of the original model: a state dict in .safetensors or .pth.", show_default=False),
    ] = None,
    reference_pretrained: Annotated[
        bool, typer.Option("--reference-pretrained", help="Download timm's pretrained weights of the original model.")
    ] = False,
    split: Split = "val",
    class_map: ClassMap = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of images to measure.", show_default="all")] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Share of an image's shorter side that the crop keeps, for both models.", show_default=False),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency at batch 1 and at --batch-size.")] = True,
    out: JsonFile = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Measure accuracy, agreement with the original model, size, FLOPs, memory and latency."""
    from ..data.transforms import check_crop, set_crop
    from ..measure.comparison import compare, path_lines
    from ..models.properties import check_classifier
    from ..report.page import console_summary
    from ..runtime import progress
    from .models import open_model

    check_outputs(out)
    check_crop(crop_pct)
    labels = {"reference": reference, "model": model}
    models = {}
    with progress.progress_bars():
        # One choice for both files; the model may have none, as a folder does.
        chosen = use_ema if weights is not None or reference_weights is None else None
        network = open_model(model, weights=weights, use_ema=chosen, pretrained=pretrained, device=device)
        if reference is not None:
            models["reference"] = open_model(
                reference,
                weights=reference_weights,
                use_ema=use_ema if reference_weights is not None else None,
                pretrained=reference_pretrained,
                device=device,
                option="--reference",
            )
        models["model"] = network
        check_classifier(models)
        if crop_pct is not None:
            set_crop(models.values(), crop_pct)
        loader = open_data(
            network, data, split, samples, batch_size, workers, skip_bad, labelled=True, class_map=class_map
        )
        record = compare(models, labels, loader, (1, batch_size) if latency else (), cost_batch=batch_size)
    console = make_console()
    console.print(console_summary(record))
    for line in path_lines(record["kernel_paths"]):
        console.print(line, soft_wrap=True)
    print_bad(console, loader.bad)
    write_results(console, record, out)
