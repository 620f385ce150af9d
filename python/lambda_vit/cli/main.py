"""The command line: reads options, calls the library, prints. What is computed stands in the other modules."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import (  # noqa: F401 (each registers its command)
    command_export,
    command_finetune,
    command_frequency,
    command_import,
    command_plan,
    command_report,
    command_select,
)
from .command_options import (
    BatchSize,
    ClassMap,
    Data,
    Device,
    Estimators,
    FailureError,
    Model,
    Pretrained,
    Remove,
    Samples,
    SelectionFile,
    SkipBad,
    Weights,
    Workers,
    app,
    check_made_for,
    chosen_layers,
    make_console,
    open_data,
    parse_indices,
    print_next,
    report_bad,
    weights_options,
)
from .packages import MissingPackageError


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "cpu",
) -> None:
    """Train, measure, select, dilute, remove and compare on scikit-learn's digits; takes a minute or two."""
    from lambda_kernels.files import check_writable

    from . import demo as module
    from . import environment, progress
    from .loading import check_device

    console = make_console()
    check_writable(out / "report.html")
    console.print(f"lambda-vit demo, seed {seed}, writing to {out}/")
    for name, value in environment.versions().items():
        console.print(f"  {name:15} {value}", soft_wrap=True)
    options = module.DemoOptions(seed=seed, device=str(check_device(device)))
    with progress.shown() as bars:
        result = module.run_demo(out, options, bars.console if bars.console.is_terminal else console)
    console.print(f"\nReport:  {out / 'report.html'}\nModel:   {out / 'model'}/")
    console.print("\nOn your own images:")
    for entry in result.record["next_commands"]:
        console.print(f"  # {entry['what']}\n  {entry['command']}", soft_wrap=True)
    if result.failures:
        raise FailureError("; ".join(result.failures))


@app.command()
def profile(
    model: Model,
    data: Data,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "train",
    samples: Samples = 256,
    estimator: Annotated[Estimators, typer.Option(help="Of the entropy.")] = Estimators.both,
    bins: Annotated[int, typer.Option(min=2, max=65536, help="Of the histogram of a channel.")] = 256,
    out: Annotated[Optional[Path], typer.Option(help="Write JSON here.", show_default=False)] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="Draw it: .png, .svg or .pdf.", show_default=False)] = None,  # noqa: UP045
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Print the entropy of every attention and MLP output, block by block."""
    from lambda_kernels.files import write_json

    from . import profile_figures, progress
    from .layer_profile import profile_layers
    from .loading import open_model
    from .plot_files import check_outputs
    from .profile_table import profile_notes, profile_table

    check_outputs(out, plot)
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device=device)
        loader = open_data(network, data, split, samples, batch_size, workers, skip_bad)
        record = {"model": model, **profile_layers(network, loader, estimator=estimator.value, bins=bins).to_dict()}
    console = make_console()
    console.print(f"{model}: mean entropy per channel, bits ({record['samples']} images)", soft_wrap=True)
    console.print(profile_table(record))
    for line in profile_notes(record):
        console.print(line, soft_wrap=True)
    report_bad(console, loader)
    if out is not None:
        write_json(out, record)
    if plot is not None:
        profile_figures.save_plot(plot, record)
    for written in filter(None, (out, plot)):
        console.print(f"Written: {written}", soft_wrap=True)


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.", show_default=False)],
    weights: Weights = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    residual_scale: Annotated[
        float, typer.Option(help="1: attention skipped. 2: it was diluted while training.")
    ] = 1.0,
    tome_r: Annotated[str, typer.Option(help="Tokens to merge per block with attention: 8, or one each: 8,6,4.")] = "",
    tome_start: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The first of the blocks with attention to merge tokens, from 0.", show_default="1"),
    ] = None,
) -> None:
    """Delete attention layers, or merge tokens, and save the smaller model."""
    from lambda_kernels import convert_vit, save_pretrained
    from lambda_kernels.files import check_writable

    from . import progress
    from .loading import open_model
    from .validation import kernel_paths, merging_lines

    merged = parse_indices(tome_r, "--tome-r") or None
    chosen = chosen_layers(selection, remove) if selection or remove or merged is None else ()
    check_writable(out / "config.json")
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device="cpu")
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
    following = ["validate", "--model", out, "--reference", model]
    print_next(console, *following, *weights_options("--reference-", weights, pretrained), "--data", "path/to/images")


@app.command()
def validate(
    model: Model,
    data: Data,
    weights: Weights = None,
    pretrained: Pretrained = False,
    reference: Annotated[Optional[str], typer.Option(help="The original, to compare with.", show_default=False)] = None,  # noqa: UP045
    reference_weights: Weights = None,
    reference_pretrained: Annotated[bool, typer.Option("--reference-pretrained", help="As --pretrained.")] = False,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    class_map: ClassMap = None,
    samples: Annotated[Optional[int], typer.Option(min=1, help="Fewer images than all.", show_default=False)] = None,  # noqa: UP045
    crop_pct: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Share of an image's shorter side, for both models in place of their own.", show_default=False
        ),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Take times at batch 1 and --batch-size.")] = True,
    out: Annotated[Optional[Path], typer.Option(help="Write JSON here.", show_default=False)] = None,  # noqa: UP045
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Measure accuracy, agreement with the original, size, FLOPs, memory and latency."""
    from lambda_kernels.files import write_json

    from . import progress
    from .loading import open_model
    from .plot_files import check_outputs
    from .report import console_summary
    from .validation import check_classifier, check_crop, compare, path_lines, set_crop

    check_outputs(out)
    check_crop(crop_pct)
    labels = {"reference": reference, "model": model}
    models = {}
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device=device)
        if reference is not None:
            models["reference"] = open_model(
                reference,
                weights=reference_weights,
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
    report_bad(console, loader)
    if out is not None:
        write_json(out, record)
        console.print(f"Written: {out}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices, what the extension was built with, and which backend each operator takes and why."""
    from rich.table import Table

    from . import environment

    found: dict[str, Any] = {
        "versions": environment.versions(),
        "backends": environment.backends(),
        "tuning": environment.tuning_status(),
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
    console.print(f"tuning {tuned['switch']}, {len(tuned['entries'])} measured in {tuned['file']}", soft_wrap=True)
    for entry in tuned["entries"]:
        times = ", ".join(f"{name} {time:.1f} µs" for name, time in entry["times_us"].items())
        console.print(f"  {entry['problem']}: {entry['candidate']} ({times})", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point. Expected errors are one line and exit code 2; LAMBDA_VIT_DEBUG=1 shows where they came from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every terminal and pipe can show λ and →
    warnings.showwarning = _show_warning
    try:
        app()
    except FailureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (
        ValueError,
        RuntimeError,
        OSError,
        MissingPackageError,
    ) as error:  # a TypeError would be a fault of this program
        if os.environ.get("LAMBDA_VIT_DEBUG", "0") != "0":
            raise
        hint = (
            ""
            if isinstance(error, (ValueError, OSError, ImportError))
            else " (LAMBDA_VIT_DEBUG=1 shows where it came from)"
        )
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
