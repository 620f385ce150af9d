"""`lambda-vit select`: picks the attention layers to remove, tries every pick, and writes the report."""

from __future__ import annotations

import contextlib
import enum
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..selection.strategies import SEARCHES, STRATEGIES
from .app import app, make_console
from .models import make_weights_options
from .options import (
    BatchSize,
    Bins,
    Cache,
    ClassMap,
    Data,
    Device,
    Estimator,
    Model,
    Pretrained,
    Samples,
    Score,
    SkipBad,
    Split,
    Weights,
    Workers,
    open_data,
    parse_bytes,
    parse_indices,
    print_bad,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..data.loader import ImageLoader
    from ..runtime.processes import Processes
    from ..selection.result import Selection
    from ..selection.trajectory import TrialData

# Number of images to profile layers on: every token counts, so entropies per channel need no more.
PROFILE_IMAGES = 128


class Strategy(str, enum.Enum):
    """The registered strategies, by name."""

    _ignore_ = ["registered", "name_of"]  # noqa: RUF012 (enum's own word, which no annotation may change)
    registered = vars()
    for name_of in STRATEGIES:
        registered[name_of.replace("-", "_")] = name_of


DEFAULT_STRATEGY = Strategy("nose")

STRATEGY_HELP = (
    "How layers are picked. "
    + "; ".join(
        f"{how}: {', '.join(name for name in STRATEGIES if STRATEGIES[name].how == key)}"
        for key, how in SEARCHES.items()
    )
    + "."
)


@app.command()
def select(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="Output folder for selection.json, the report and the progress; or NAME.json, with the rest in NAME/.",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    pretrained: Pretrained = False,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Number of attention layers to remove; 5 if no budget is given.", show_default=False),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Share of the parameters to retain, such as 0.85, instead of --count.", show_default=False),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Share of the FLOPs to retain, such as 0.85, instead of --count.", show_default=False),
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option(
            help="Throughput to reach, relative to the full model, such as 1.2, instead of --count.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help=STRATEGY_HELP)] = DEFAULT_STRATEGY,
    estimator: Annotated[Estimator, typer.Option(help="Entropy estimator.")] = Estimator.gaussian,
    signed: Annotated[bool, typer.Option("--signed", help="Use nose-signed instead of nose.")] = False,
    score: Annotated[Score, typer.Option(help="Output whose entropy is measured.")] = Score.logits,
    bins: Bins = 256,
    exclude: Annotated[str, typer.Option(help="Indices of blocks that retain their attention: 0,11.")] = "",
    layers: Annotated[
        str, typer.Option(help="Ordered block indices for --strategy explicit: 1,5,4.", show_default=False)
    ] = "",
    beam: Annotated[int, typer.Option(min=1, help="Number of sets that a greedy search retains per round.")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed of --strategy random.")] = 0,
    split: Split = "train",
    samples: Samples = 1024,
    class_map: ClassMap = None,
    eval_split: Annotated[
        str, typer.Option(help="Split of the images on which the picks are tried, without training.")
    ] = "val",
    eval_samples: Annotated[
        int, typer.Option(min=0, help="Number of images on which the picks are tried; 0 skips the trial.")
    ] = 1024,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest loss of top-1, in points, of the recommended pick.")
    ] = 5.0,
    profile: Annotated[bool, typer.Option(help="Add a profile of the layers to the report.")] = True,
    latency: Annotated[bool, typer.Option(help="Measure the throughput after each pick.")] = True,
    cache: Annotated[Cache, typer.Option(help="Storage of embedded images between rounds.")] = Cache.auto,
    cache_budget: Annotated[str, typer.Option(help="Largest size of the cache, such as 8G.", show_default=False)] = "",
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder of the cache on disk.", show_default="temporary")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an earlier run in --out and start over.")] = False,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Find the attention layers whose removal changes the output least, try each pick, and write a report.

    If the search is interrupted, run the same command again to resume. Under torchrun the processes share the images.
    """
    from lambda_kernels.files import check_writable

    from ..runtime import progress
    from ..runtime.processes import exit_on_sigterm, local_device, process_group
    from ..selection.budget import Budget
    from ..selection.result import SelectionWarning
    from ..selection.search import check_search, run_selection
    from .models import open_model

    console = make_console()
    excluded, given = parse_indices(exclude, "--exclude"), parse_indices(layers, "--layers")
    budget = Budget(count, params, flops, throughput)
    named = "nose-signed" if signed and strategy.value == "nose" else strategy.value
    # These checks raise before anything is loaded.
    budget.asked()
    check_search(named, signed=signed, beam=beam, layers=given or None)
    cached = {
        "cache": cache.value,
        "cache_budget": parse_bytes(cache_budget, "--cache-budget"),
        "cache_folder": cache_dir,
    }
    folder = out.with_suffix("") if out.suffix == ".json" else out
    selection_file = out if out.suffix == ".json" else out / "selection.json"
    for path in (selection_file, folder / "report.html"):
        check_writable(path)
    with process_group() as processes, exit_on_sigterm(), contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(progress.progress_bars())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", SelectionWarning)  # the selection lists them, and they are printed with it
        network = open_model(model, weights=weights, pretrained=pretrained, device=local_device(device))
        shard = (processes.rank, processes.size)
        loading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "skip_bad": skip_bad, "shard": shard}
        criterion = STRATEGIES[named].criterion
        labelled = criterion is not None and criterion.label
        loader = open_data(network, data, split, samples, **loading, labelled=labelled, class_map=class_map)
        trial, trial_notes = _open_trial(
            network, data, split, loader, eval_split, eval_samples, class_map=class_map, **loading
        )
        if processes.size > 1:
            processes.assert_same(_data_of(loader, trial), "Select")
        selection, engine = run_selection(
            network,
            loader,
            budget,
            strategy=named,
            estimator=estimator.value,
            signed=signed,
            score=score.value,
            bins=bins,
            exclude=excluded,
            layers=given or None,
            beam=beam,
            seed=seed,
            cache=cached,
            progress_file=folder / "progress.json",
            restart=restart,
            processes=processes,
        )
        with processes.all_or_none("Write the selection"):
            if processes.is_main:
                selection.to_json(selection_file)
        record = _measure(
            network, selection, loader, trial, processes, profile, batch_size if latency else None, tolerance, bins
        )
        own_bad = [*loader.bad, *trial.loader.bad] if trial else loader.bad
        bad = sorted({path for paths in processes.gather(own_bad) for path in paths})
    if not processes.is_main:
        return
    own = ["--model", model, *make_weights_options("--", weights, pretrained)]
    reference = ["--reference", model, *make_weights_options("--reference-", weights, pretrained)]
    checking = ["--data", data, *_validation_options(trial, class_map, skip_bad)]
    if not network.num_classes or (trial is not None and not trial.labelled):
        checking = None
    training = ["--data", data, *(["--skip-bad", skip_bad] if skip_bad else [])]
    commands = _next_commands(
        selection, record["trajectory"], selection_file, folder, own, training, reference, checking
    )
    _report(
        console, folder, selection_file, network, model, selection, record, engine, commands,
        [*trial_notes, *record["notes"]], _describe_data(data, loader, trial),
    )  # fmt: skip
    print_bad(console, bad)
    for entry in commands:
        console.print(f"# {entry['what']}\n{entry['command']}", soft_wrap=True)


def _open_trial(
    network: nn.Module,
    data: Path,
    split: str,
    loader: ImageLoader,
    eval_split: str,
    eval_samples: int,
    class_map: Path | None,
    **loading: Any,
) -> tuple[TrialData | None, list[str]]:
    """Open the images on which the picks are tried; with notes for the report."""
    from ..selection.trajectory import TrialData

    if not eval_samples:
        return None, []
    if not network.num_classes:
        return None, ["The picks were not tried: the model has no classifier, hence no answers to compare"]
    notes: list[str] = []

    def opened(name: str) -> tuple[ImageLoader, bool]:
        try:
            return open_data(network, data, name, eval_samples, **loading, labelled=True, class_map=class_map), True
        except ValueError as error:
            if class_map is not None:
                raise
            # Without labels of the model's classes, the agreement with the full model remains.
            found = open_data(network, data, name, eval_samples, **loading)
            notes.append(f"Accuracy was not measured: {error}")
            return found, False

    try:
        found, labelled = opened(eval_split)
    except ValueError as error:
        notes = [f"The picks were tried on the images they were measured on: {error}"]
        found, labelled = opened(split)
    held_out = found.dataset.at != loader.dataset.at
    return TrialData(found, labelled, found.dataset.split, held_out), notes


def _measure(
    network: nn.Module,
    selection: Selection,
    loader: ImageLoader,
    trial: TrialData | None,
    processes: Processes,
    profile: bool,
    throughput_batch: int | None,
    tolerance: float,
    bins: int,
) -> dict[str, Any]:
    """Measure the trajectory and the layer profile of a record; the same in all processes."""
    from ..data.loader import make_loader, subset
    from ..measure.layer_profile import profile_layers
    from ..report.records.recommendation import add_recommendation
    from ..runtime.capture import capture_warnings
    from ..selection.trajectory import measure_trajectory

    record: dict[str, Any] = {"trajectory": None, "profile": None, "notes": []}
    if trial is not None:
        trajectory = measure_trajectory(
            network, trial, selection, throughput_batch=throughput_batch, bins=bins, processes=processes
        )
        record["trajectory"] = add_recommendation(trajectory, selection, tolerance)
    if profile:
        with processes.all_or_none("Profile"):
            if processes.is_main:
                few = subset(loader.dataset, min(PROFILE_IMAGES, len(loader.dataset)))
                images = make_loader(few, loader.batch_size, workers=loader.workers, skip_bad=loader.skip_bad)
                found, record["notes"] = capture_warnings(lambda: profile_layers(network, images))
                record["profile"] = found.to_dict()
    return record


def _data_of(loader: ImageLoader, trial: TrialData | None) -> dict[str, Any]:
    """Return what all processes must have opened alike: each reads its own disks."""
    from ..data.fingerprints import data_fingerprint

    found = {f"picked on, {name}": value for name, value in data_fingerprint(loader).items()}
    if trial is not None:
        found |= {f"tried on, {name}": value for name, value in trial.fingerprint().items()}
    return found


def _describe_data(data: Path, loader: ImageLoader, trial: TrialData | None) -> dict[str, Any]:
    found = {"description": str(data), "calibration": len(loader.dataset)}
    return found if trial is None else found | {"validation": len(trial.loader.dataset)}


def _validation_options(trial: TrialData | None, class_map: Path | None, skip_bad: int) -> list[object]:
    """Return the options by which `validate` reads the images on which the picks were tried."""
    split = trial.split if trial is not None else "val"
    found: list[object] = [] if split in ("val", "all") else ["--split", split]
    found += [] if class_map is None else ["--class-map", class_map]
    return [*found, "--skip-bad", skip_bad] if skip_bad else found


def _next_commands(
    selection: Selection,
    trajectory: dict[str, Any] | None,
    selection_file: Path,
    folder: Path,
    own: list[object],
    training: list[object],
    reference: list[object],
    checking: list[object] | None,
) -> list[dict[str, str]]:
    """List the next commands: for the recommended layers if there are any, otherwise for all picks.

    `own` and `reference` name the model, `training` and `checking` the images; `checking` is None if the images have no
    labels of the model's classes.
    """
    step = trajectory["recommended"]["step"] if trajectory else 0
    chosen = ["--selection", selection_file]
    which = "the picked layers"
    if 0 < step < len(selection.layers):
        chosen = ["--remove", ",".join(map(str, selection.layers[:step]))]
        which = "the recommended layers"
    small = folder / "model"
    entries = [(f"Plan a training without {which}", ["plan", *own, *chosen, *training])]
    if checking is not None:
        at = checking.index("--class-map") if "--class-map" in checking else len(checking)
        run = [*checking[at : at + 2], "--recipe", "short", "--out", folder / "finetune"]
        entries.append((f"Train, and remove {which}", ["finetune", *own, *chosen, *training, *run]))
    entries.append((f"Remove {which} without training", ["convert", *own, *chosen, "--out", small]))
    if checking is not None:
        entries.append(("Compare with the full model", ["validate", "--model", small, *reference, *checking]))
    return [{"what": what, "command": f"lambda-vit {shlex.join(map(str, words))}"} for what, words in entries]


def _report(
    console: Console,
    folder: Path,
    selection_file: Path,
    network: nn.Module,
    model: str,
    selection: Selection,
    measured: dict[str, Any],
    engine: dict[str, Any] | None,
    commands: list[dict[str, str]],
    notes: list[str],
    described: dict[str, Any],
) -> None:
    from ..report.page import console_summary, write_report
    from ..report.records.selection import selection_record
    from ..runtime import environment

    record = selection_record(
        network,
        model,
        selection,
        command=environment.command_line(),
        data=described,
        trajectory=measured["trajectory"],
        profile=measured["profile"],
        engine=engine,
        next_commands=commands,
        notes=notes,
    )
    paths = write_report(record, folder)
    console.print(console_summary(record))
    written = ", ".join(map(str, (selection_file, paths["html"])))
    console.print(f"Picked, in order: {', '.join(map(str, selection.layers))}. Written: {written}", soft_wrap=True)
