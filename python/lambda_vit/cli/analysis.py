"""`lambda-vit profile` and `lambda-vit frequency`: what the layers of a model hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, make_console, write_results
from .models import check_made_for, read_layers
from .options import (
    BatchSize,
    Bins,
    Data,
    Device,
    Estimators,
    JsonFile,
    Model,
    Plot,
    Pretrained,
    Remove,
    Samples,
    SelectionFile,
    SkipBad,
    Split,
    UseEma,
    Weights,
    Workers,
    check_outputs,
    open_data,
    print_bad,
)

if TYPE_CHECKING:
    from torch import nn

    from ..selection.result import Selection


@app.command()
def frequency(
    model: Model,
    data: Data,
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    compare: Annotated[
        Path | None,
        typer.Option(help="Folder of the model after removal, instead of --remove or --selection.", show_default=False),
    ] = None,
    split: Split = "val",
    samples: Samples = 256,
    out: JsonFile = None,
    plot: Plot = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Measure the amplitude of features by spatial frequency in every block, before and after removal."""
    from ..measure.frequency import compare_frequencies, feature_frequencies
    from ..report.figures import frequency as frequency_figures
    from ..report.records.readings import subject
    from ..report.tables import frequency_notes, frequency_table
    from ..runtime import environment, progress
    from .models import open_model

    chosen = _chosen(selection, remove, compare)
    check_outputs(out, plot)
    with progress.progress_bars():
        network = open_model(model, weights=weights, use_ema=use_ema, pretrained=pretrained, device=device)
        if selection is not None and not isinstance(chosen, tuple):
            check_made_for(chosen, selection, network, model)
        other = _other(network, chosen, compare, device)
        loader = open_data(network, data, split, samples, batch_size, workers, skip_bad)
        if other is None:
            found = {"before": feature_frequencies(network, loader).to_dict()}
        else:
            found = compare_frequencies(network, other, loader).to_dict()
    record: dict[str, Any] = {
        "model": model,
        "compared": None if compare is None else str(compare),
        "command": environment.command_line(),
        "environment": environment.versions(),
        "unit": "natural logarithm",
        **found,
    }
    console = make_console()
    console.print(
        f"{subject(record)}: Δ log amplitude of the blocks' outputs ({record['before']['samples']} images)",
        soft_wrap=True,
    )
    console.print(frequency_table(record))
    for line in frequency_notes(record):
        console.print(line, soft_wrap=True)
    print_bad(console, loader.bad)
    write_results(console, record, out, plot, frequency_figures.save_plot)


def _chosen(selection: Path | None, remove: str, compare: Path | None) -> Selection | tuple[int, ...] | None:
    """Return the layers to skip; None if there is nothing to compare with, or a saved model."""
    if sum((selection is not None, bool(remove), compare is not None)) > 1:
        raise ValueError("pass at most one of --remove 1,5,4,11, --selection FILE and --compare FOLDER")
    if compare is not None and not compare.is_dir():
        raise ValueError(f"--compare {compare} is not a folder; pass one that convert or finetune saved")
    return None if selection is None and not remove else read_layers(selection, remove)


def _other(
    network: nn.Module, chosen: Selection | tuple[int, ...] | None, compare: Path | None, device: str
) -> nn.Module | None:
    from ..data.transforms import check_preparation
    from ..models.views import skip_attention
    from .models import open_model

    if chosen is not None:
        return skip_attention(network, chosen)
    if compare is None:
        return None
    other = open_model(str(compare), device=device, option="--compare")
    check_preparation({"--model": network, "--compare": other}, "Measure each alone")
    return other


@app.command()
def profile(
    model: Model,
    data: Data,
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    split: Split = "train",
    samples: Samples = 256,
    estimator: Annotated[Estimators, typer.Option(help="Entropy estimator.")] = Estimators.both,
    bins: Bins = 256,
    out: JsonFile = None,
    plot: Plot = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Measure the entropy of every attention and MLP output, block by block."""
    from ..measure.layer_profile import profile_layers
    from ..report.figures import layers as profile_figures
    from ..report.tables import profile_notes, profile_table
    from ..runtime import progress
    from .models import open_model

    check_outputs(out, plot)
    with progress.progress_bars():
        network = open_model(model, weights=weights, use_ema=use_ema, pretrained=pretrained, device=device)
        loader = open_data(network, data, split, samples, batch_size, workers, skip_bad)
        record = {"model": model, **profile_layers(network, loader, estimator=estimator.value, bins=bins).to_dict()}
    console = make_console()
    console.print(f"{model}: mean entropy per channel, bits ({record['samples']} images)", soft_wrap=True)
    console.print(profile_table(record))
    for line in profile_notes(record):
        console.print(line, soft_wrap=True)
    print_bad(console, loader.bad)
    write_results(console, record, out, plot, profile_figures.save_plot)
