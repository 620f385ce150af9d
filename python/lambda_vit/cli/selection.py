"""`lambda-vit select`: picks the attention layers to remove, tries every pick, and writes the report."""

from __future__ import annotations

import contextlib
import enum
import shlex
from dataclasses import dataclass
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
    UseEma,
    Weights,
    Workers,
    open_data,
    parse_bytes,
    parse_indices,
    print_bad,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data.loader import ImageLoader
    from ..runtime.processes import Processes
    from ..selection.budget import Budget
    from ..selection.result import Selection
    from ..selection.search import SearchOptions
    from ..selection.trajectory import TrialData


class Strategy(str, enum.Enum):
    """The registered strategies, by name."""

    _ignore_ = ["registered", "name_of"]  # noqa: RUF012 (enum's own word, which no annotation may change)
    registered = vars()
    for name_of in STRATEGIES:
        registered[name_of.replace("-", "_")] = name_of


DEFAULT_STRATEGY = Strategy("nose")

STRATEGY_HELP = (
    "How to pick layers. "
    + "; ".join(
        f"{how}: {', '.join(name for name in STRATEGIES if STRATEGIES[name].how == key)}"
        for key, how in SEARCHES.items()
    )
    + "."
)


@dataclass(frozen=True)
class ModelOptions:
    """The model as the command line names it."""

    name: str
    weights: Path | None
    use_ema: bool | None
    pretrained: bool

    def to_flags(self, prefix: str) -> list[object]:
        """Return the options that name the model to another command, such as --model and --weights."""
        first = "--model" if prefix == "--" else prefix.removesuffix("-")
        return [first, self.name, *make_weights_options(prefix, self.weights, self.use_ema, self.pretrained)]


@dataclass(frozen=True)
class DataOptions:
    """The images on which layers are picked and tried, and how images are read."""

    data: Path
    split: str
    samples: int
    trial_split: str
    trial_samples: int  # the number of images on which the picks are tried; 0: none
    class_map: Path | None
    batch_size: int
    workers: int
    skip_bad: int

    def open(
        self, network: nn.Module, split: str, samples: int, processes: Processes, *, labelled: bool
    ) -> ImageLoader:
        """Open this process's share of the images of a split."""
        return open_data(
            network,
            self.data,
            split,
            samples,
            self.batch_size,
            self.workers,
            self.skip_bad,
            labelled=labelled,
            class_map=self.class_map,
            shard=(processes.rank, processes.size),
        )


@dataclass(frozen=True)
class ReportOptions:
    """The output files, and what the report measures besides the search."""

    folder: Path
    selection_file: Path
    tolerance: float
    profile: bool
    latency: bool


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
    use_ema: UseEma = None,
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
            help="Throughput to reach, relative to the full model, such as 1.2, instead of --count.", show_default=False
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
    min_gap: Annotated[
        int, typer.Option(min=1, help="Smallest distance between two blocks of a greedy search; 2 forbids neighbours.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Random seed of --strategy random, and of the images for the repair of recoverability.")
    ] = 0,
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

    from ..selection.budget import Budget
    from ..selection.search import SearchOptions

    folder = out.with_suffix("") if out.suffix == ".json" else out
    selection_file = out if out.suffix == ".json" else out / "selection.json"
    # Wrong options fail here, before anything is loaded.
    excluded, given = parse_indices(exclude, "--exclude"), parse_indices(layers, "--layers")
    budget = Budget(count, params, flops, throughput)
    search = SearchOptions(
        strategy=strategy.value,
        estimator=estimator.value,
        signed=signed,
        score=score.value,
        bins=bins,
        exclude=excluded,
        layers=given or None,
        beam=beam,
        min_gap=min_gap,
        seed=seed,
        cache=cache.value,
        cache_budget=parse_bytes(cache_budget, "--cache-budget"),
        cache_folder=cache_dir,
        progress_file=folder / "progress.json",
        restart=restart,
    )
    for path in (selection_file, folder / "report.html"):
        check_writable(path)
    _select(
        ModelOptions(model, weights, use_ema, pretrained),
        device,
        DataOptions(data, split, samples, eval_split, eval_samples, class_map, batch_size, workers, skip_bad),
        budget,
        search,
        ReportOptions(folder, selection_file, tolerance, profile, latency),
    )


def _select(
    model: ModelOptions, device: str, images: DataOptions, budget: Budget, search: SearchOptions, wanted: ReportOptions
) -> None:
    from ..data.fingerprints import data_fingerprint
    from ..models.properties import why_no_classes
    from ..report.page import console_summary, write_report
    from ..report.records.selection import measure_selection, selection_record
    from ..runtime import environment, progress
    from ..runtime.processes import exit_on_sigterm, local_device, process_group
    from ..selection.search import Searcher
    from .models import open_model

    with process_group() as processes, exit_on_sigterm(), contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(progress.progress_bars())
        network = open_model(
            model.name,
            weights=model.weights,
            use_ema=model.use_ema,
            pretrained=model.pretrained,
            device=local_device(device),
        )
        criterion = STRATEGIES[search.strategy].criterion
        labelled = criterion is not None and criterion.label
        loader = images.open(network, images.split, images.samples, processes, labelled=labelled)
        trial, notes = _open_trial(network, images, loader, processes)
        if processes.size > 1:  # each reads its own disks
            opened = {f"picked on, {name}": value for name, value in data_fingerprint(loader).items()}
            if trial is not None:
                opened |= {f"tried on, {name}": value for name, value in trial.fingerprint().items()}
            processes.assert_same(opened, "Select")
        selection, engine = Searcher(network, loader, budget, search, processes).run()
        with processes.all_or_none("Write the selection"):
            if processes.is_main:
                selection.to_json(wanted.selection_file)
        trajectory, profile, more = measure_selection(
            network,
            selection,
            loader,
            trial,
            profile=wanted.profile,
            throughput_batch=images.batch_size if wanted.latency else None,
            tolerance=wanted.tolerance,
            bins=search.bins,
            processes=processes,
        )
        own_bad = [*loader.bad, *trial.loader.bad] if trial else loader.bad
        bad = sorted({path for paths in processes.gather(own_bad) for path in paths})
    if not processes.is_main:
        return
    data = {"description": str(images.data), "calibration": len(loader.dataset)}
    if trial is not None:
        data["validation"] = len(trial.loader.dataset)
    has_labels = why_no_classes(network) is None and (trial is None or trial.labelled)
    commands = _next_commands(
        selection, trajectory, wanted, model, images, "val" if trial is None else trial.split, has_labels
    )
    record = selection_record(
        network,
        model.name,
        selection,
        command=environment.command_line(),
        data=data,
        trajectory=trajectory,
        profile=profile,
        engine=engine,
        next_commands=commands,
        notes=[*notes, *more],
    )
    paths = write_report(record, wanted.folder)
    console = make_console()
    console.print(console_summary(record))
    written = ", ".join(map(str, (wanted.selection_file, paths["html"])))
    console.print(f"Picked, in order: {', '.join(map(str, selection.layers))}. Written: {written}", soft_wrap=True)
    print_bad(console, bad)
    for entry in commands:
        console.print(f"# {entry['what']}\n{entry['command']}", soft_wrap=True)


def _open_trial(
    network: nn.Module, images: DataOptions, loader: ImageLoader, processes: Processes
) -> tuple[TrialData | None, list[str]]:
    """Open the images on which the picks are tried; with notes for the report."""
    from ..models.properties import why_no_classes
    from ..selection.trajectory import TrialData

    if not images.trial_samples:
        return None, []
    if (reason := why_no_classes(network)) is not None:
        return None, [f"The picks were not tried: the model {reason}, hence no answers to compare"]
    notes: list[str] = []

    def open_split(split: str) -> tuple[ImageLoader, bool]:
        try:
            return images.open(network, split, images.trial_samples, processes, labelled=True), True
        except ValueError as error:
            if images.class_map is not None:
                raise
            # Without labels of the model's classes, the agreement with the full model remains.
            found = images.open(network, split, images.trial_samples, processes, labelled=False)
            notes.append(f"Accuracy was not measured: {error}")
            return found, False

    try:
        found, labelled = open_split(images.trial_split)
    except ValueError as error:
        notes = [f"The picks were tried on the images they were measured on: {error}"]
        found, labelled = open_split(images.split)
    held_out = found.dataset.at != loader.dataset.at
    return TrialData(found, labelled, found.dataset.split, held_out), notes


def _next_commands(
    selection: Selection,
    trajectory: dict[str, Any] | None,
    wanted: ReportOptions,
    model: ModelOptions,
    images: DataOptions,
    split: str,
    has_labels: bool,
) -> list[dict[str, str]]:
    """List the next commands: for the recommended layers if there are any, otherwise for all picks.

    `split` names the images to validate on; without labels of the model's classes there is nothing to train or validate.
    """
    step = trajectory["recommended"]["step"] if trajectory else 0
    chosen = ["--selection", wanted.selection_file]
    which = "the picked layers"
    if 0 < step < len(selection.layers):
        chosen = ["--remove", ",".join(map(str, selection.layers[:step]))]
        which = "the recommended layers"
    small, full = wanted.folder / "model", model.to_flags("--reference-")
    own = [*model.to_flags("--"), *chosen]
    class_map = ["--class-map", images.class_map] if images.class_map is not None else []
    skip_bad = ["--skip-bad", images.skip_bad] if images.skip_bad else []
    training = ["--data", images.data, *skip_bad]
    at = ["--split", split] if split not in ("val", "all") else []
    run = [*class_map, "--recipe", "recover", "--out", wanted.folder / "finetune"]
    checking = ["--data", images.data, *at, *class_map, *skip_bad]
    entries = [
        (f"Plan a training without {which}", ["plan", *own, *training, "--epochs", 30, "--teacher", model.name], True),
        (f"Train, and remove {which}", ["finetune", *own, *training, *run], has_labels),
        (f"Remove {which} without training", ["convert", *own, "--out", small], True),
        ("Compare with the full model", ["validate", "--model", small, *full, *checking], has_labels),
    ]
    return [
        {"what": what, "command": f"lambda-vit {shlex.join(map(str, words))}"}
        for what, words, is_possible in entries
        if is_possible
    ]
