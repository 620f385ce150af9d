"""The command line: reads options, calls the library, prints. What is computed stands in the other modules."""

from __future__ import annotations

import enum
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    help="Find the attention layers a vision transformer does not need, fade them out, delete them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer evaluates annotations, so that Optional stays until Python 3.10 is gone (PEP 604 unions work only from its 0.12).
Model = Annotated[str, typer.Option(help="timm's name of the model, or a folder saved by convert.", show_default=False)]
Weights = Annotated[Optional[Path], typer.Option(help="State dict, .safetensors or .pth.", show_default=False)]  # noqa: UP045
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Take timm's own weights from the hub.")]
Data = Annotated[Path, typer.Option(help="Folder or zip with train/<class>/* and val/<class>/*.", show_default=False)]
Samples = Annotated[int, typer.Option(min=1, help="Images to measure on, spread evenly over the classes.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")]
SkipBad = Annotated[int, typer.Option(min=0, help="Leave out up to this many unreadable images.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Out = Annotated[Path, typer.Option(help="Where to write.", show_default=False)]


class Estimator(str, enum.Enum):
    """Of an entropy."""

    gaussian = "gaussian"
    histogram = "histogram"


class Estimators(str, enum.Enum):
    """Of a profile, which can have both from one pass."""

    both = "both"
    gaussian = "gaussian"
    histogram = "histogram"


class Strategy(str, enum.Enum):
    """Of a selection."""

    nose = "nose"
    random = "random"
    first = "first"


class Score(str, enum.Enum):
    """Where the entropy is measured."""

    logits = "logits"
    pre_logits = "pre_logits"


def _console() -> object:
    from rich.console import Console

    # Paths and model names are printed as they are: brackets in them are no markup.
    return Console(highlight=False, markup=False)


def _open_data(
    model: object,
    data: Path,
    split: str,
    samples: int | None,
    batch_size: int,
    workers: int,
    skip_bad: int,
    *,
    labelled: bool = False,
    class_map: Path | None = None,
) -> object:
    """A loader; unless it is `labelled`, class folders only spread the samples and need not be the model's classes."""
    from .data import make_loader, open_images, subset, transforms_for

    classes = model.num_classes or None if labelled else None
    mapping = None if class_map is None else _read_class_map(class_map)
    dataset = open_images(data, split, transform=transforms_for(model), num_classes=classes, class_to_idx=mapping)
    if samples is not None and samples < len(dataset):
        dataset = subset(dataset, samples)
    return make_loader(dataset, batch_size, workers=workers, skip_bad=skip_bad)


def _read_class_map(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--class-map {path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise ValueError(f'--class-map {path} must hold an object such as {{"cat": 281, "dog": 207}}')
    return found


def _report_bad(console: object, loader: object) -> None:
    for path in loader.bad:
        console.print(f"left out, unreadable: {path}", style="yellow", soft_wrap=True)


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

    console = _console()
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
        raise _FailureError("; ".join(result.failures))


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
    from .profile_table import profile_notes, profile_table

    profile_figures.check_outputs(out, plot)
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device=device)
        loader = _open_data(network, data, split, samples, batch_size, workers, skip_bad)
        record = {"model": model, **profile_layers(network, loader, estimator=estimator.value, bins=bins).to_dict()}
    console = _console()
    console.print(f"{model}: mean entropy per channel, bits ({record['samples']} images)", soft_wrap=True)
    console.print(profile_table(record))
    for line in profile_notes(record):
        console.print(line, soft_wrap=True)
    _report_bad(console, loader)
    if out is not None:
        write_json(out, record)
    if plot is not None:
        profile_figures.save_plot(plot, record)
    for written in filter(None, (out, plot)):
        console.print(f"Written: {written}", soft_wrap=True)


@app.command()
def select(
    model: Model,
    data: Data,
    out: Out,
    weights: Weights = None,
    pretrained: Pretrained = False,
    count: Annotated[int, typer.Option(min=1, help="How many attention layers to pick.")] = 4,
    strategy: Annotated[Strategy, typer.Option(help="nose, or a control.")] = Strategy.nose,
    estimator: Annotated[Estimator, typer.Option(help="Of the entropy.")] = Estimator.gaussian,
    signed: Annotated[bool, typer.Option("--signed", help="Compare TE with its sign, as in the paper.")] = False,
    score: Annotated[Score, typer.Option(help="Where the entropy is measured.")] = Score.logits,
    exclude: Annotated[str, typer.Option(help="Blocks that keep their attention: 0,11.")] = "",
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "train",
    samples: Samples = 1024,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Pick the attention layers whose removal changes the output's entropy least, and write them down."""
    from lambda_kernels.files import check_writable

    from . import progress
    from .loading import open_model
    from .report import console_summary
    from .selection import SelectionWarning, select_layers

    console = _console()
    excluded = parse_indices(exclude, "--exclude")
    check_writable(out)
    with progress.shown(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SelectionWarning)  # the selection lists them, and they are printed with it
        network = open_model(model, weights=weights, pretrained=pretrained, device=device)
        loader = _open_data(network, data, split, samples, batch_size, workers, skip_bad)
        selection = select_layers(
            network,
            loader,
            count,
            strategy=strategy.value,
            estimator=estimator.value,
            signed=signed,
            score=score.value,
            exclude=excluded,
            seed=seed,
        )
    selection.to_json(out)
    console.print(console_summary({"selection": selection.to_dict()}))
    _report_bad(console, loader)
    console.print(f"Picked, in order: {', '.join(map(str, selection.layers))}. Written: {out}", soft_wrap=True)
    following = ["convert", "--model", model, *_weights_options("--", weights, pretrained)]
    _print_next(console, *following, "--selection", out, "--out", f"{out.stem}-model")


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.", show_default=False)],
    weights: Weights = None,
    pretrained: Pretrained = False,
    selection: Annotated[Optional[Path], typer.Option(help="What select wrote.", show_default=False)] = None,  # noqa: UP045
    remove: Annotated[str, typer.Option(help="Block indices instead: 1,5,4,11.", show_default=False)] = "",
    residual_scale: Annotated[
        float, typer.Option(help="1: attention skipped. 2: it was diluted while training.")
    ] = 1.0,
) -> None:
    """Delete attention layers and save the smaller model."""
    from lambda_kernels import convert_vit, save_pretrained
    from lambda_kernels.families import inspect_model
    from lambda_kernels.files import check_writable

    from . import progress
    from .loading import open_model
    from .selection import Selection, model_name

    if (selection is None) == (not remove):
        raise ValueError("pass either --selection FILE or --remove 1,5,4,11")
    chosen = parse_indices(remove, "--remove") if selection is None else Selection.from_json(selection)
    check_writable(out / "config.json")
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device="cpu")
    if selection is not None:
        depth = inspect_model(network).depth
        if chosen.depth not in (None, depth):
            raise ValueError(f"{selection} was made for a model of {chosen.depth} blocks, {model} has {depth}")
        name = model_name(network)
        if chosen.model is not None and not _same_model(chosen.model, name):
            raise ValueError(f"{selection} was made for {chosen.model}, not for {name}; select on this model")
    before = sum(p.numel() for p in network.parameters())
    network = convert_vit(network, chosen, residual_scale=residual_scale, inplace=True)
    after = sum(p.numel() for p in network.parameters())
    save_pretrained(network, out)
    console = _console()
    console.print(
        f"Removed the attention of blocks {', '.join(map(str, network.lambda_kernels_info.removed))}: "
        f"{before:,} → {after:,} parameters (−{100 * (1 - after / before):.1f} %). Written: {out}/",
        soft_wrap=True,
    )
    following = ["validate", "--model", out, "--reference", model]
    _print_next(console, *following, *_weights_options("--reference-", weights, pretrained), "--data", "path/to/images")


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
    class_map: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="JSON: class folder → output of the model, where neither names nor number tell.", show_default=False
        ),
    ] = None,
    samples: Annotated[Optional[int], typer.Option(min=1, help="Fewer images than all.", show_default=False)] = None,  # noqa: UP045
    latency: Annotated[bool, typer.Option(help="Take times at batch 1 and --batch-size.")] = True,
    out: Annotated[Optional[Path], typer.Option(help="Write JSON here.", show_default=False)] = None,  # noqa: UP045
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Measure accuracy, agreement with the original, size, FLOPs, memory and latency."""
    from lambda_kernels.files import check_writable, write_json

    from . import progress
    from .loading import open_model
    from .report import console_summary
    from .validation import compare, path_lines

    if out is not None:
        check_writable(out)
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
        loader = _open_data(
            network, data, split, samples, batch_size, workers, skip_bad, labelled=True, class_map=class_map
        )
        record = compare(models, labels, loader, (1, batch_size) if latency else (), cost_batch=batch_size)
    console = _console()
    console.print(console_summary(record))
    for line in path_lines(record["kernel_paths"]):
        console.print(line, soft_wrap=True)
    _report_bad(console, loader)
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

    found = {
        "versions": environment.versions(),
        "backends": environment.backends(),
        "tuning": environment.tuning_status(),
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = _console()
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


def _same_model(one: str, other: str | None) -> bool:
    """Whether two names mean one architecture and, where both say which, the same weights."""
    first, second = one.partition("."), (other or "").partition(".")
    return first[0] == second[0] and (first[2] == second[2] or not (first[2] and second[2]))


def _weights_options(prefix: str, weights: Path | None, pretrained: bool) -> list[object]:
    if weights is not None:
        return [f"{prefix}weights", weights]
    return [f"{prefix}pretrained"] if pretrained else []


def _print_next(console: object, *arguments: object) -> None:
    console.print(f"Next: lambda-vit {shlex.join(map(str, arguments))}", soft_wrap=True)


class _FailureError(RuntimeError):
    """The command did its work, and the outcome is a failure."""


def parse_indices(text: str, option: str) -> tuple[int, ...]:
    """Block indices out of "1,5,4,11".

    Raises:
        ValueError: Something in it is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} takes block indices such as 1,5,4,11; got {text!r}") from None


def main() -> None:
    """Entry point. Expected errors are one line and exit code 2; LAMBDA_VIT_DEBUG=1 shows where they came from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every terminal and pipe can show λ and →
    warnings.showwarning = _show_warning
    try:
        app()
    except _FailureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:  # a TypeError would be a fault of this program
        if os.environ.get("LAMBDA_VIT_DEBUG", "0") != "0":
            raise
        hint = "" if isinstance(error, (ValueError, OSError)) else " (LAMBDA_VIT_DEBUG=1 shows where it came from)"
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: object, category: type, *place: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
