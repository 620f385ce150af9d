"""`lambda-vit select`: pick the attention layers to remove, and report what that does."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, make_console
from .models import make_weights_options
from .options import (
    BatchSize,
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
    Strategy,
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


# Images whose layers' outputs are profiled: entropies per channel need no more, since every token counts.
PROFILE_IMAGES = 128


@app.command()
def select(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for selection.json, the report, and the progress; NAME.json puts the selection there and the "
            "rest into NAME/.",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    pretrained: Pretrained = False,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many attention layers to pick; 5 where no budget is given.", show_default=False),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(
            help="Instead: pick until this share of the parameters is left, such as 0.85.", show_default=False
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Instead: until this share of the FLOPs is left.", show_default=False),
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option(
            help="Instead: until this many times the throughput is measured, such as 1.2.", show_default=False
        ),
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help="nose, a rival, or a control.")] = Strategy.nose,
    estimator: Annotated[Estimator, typer.Option(help="Of the entropy.")] = Estimator.gaussian,
    signed: Annotated[bool, typer.Option("--signed", help="With nose: the same as nose-signed.")] = False,
    score: Annotated[Score, typer.Option(help="Where the entropy is measured.")] = Score.logits,
    bins: Annotated[int, typer.Option(min=2, max=65536, help="Of a histogram.")] = 256,
    exclude: Annotated[str, typer.Option(help="Blocks that keep their attention: 0,11.")] = "",
    layers: Annotated[str, typer.Option(help="With explicit: the blocks, in order: 1,5,4.", show_default=False)] = "",
    beam: Annotated[int, typer.Option(min=1, help="Sets of layers that a greedy search keeps; 1 is NOSE's own.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "train",
    samples: Samples = 1024,
    class_map: ClassMap = None,
    eval_split: Annotated[str, typer.Option(help="Split that the picks are tried on, nothing trained.")] = "val",
    eval_samples: Annotated[int, typer.Option(min=0, help="Images of it; 0 leaves that out.")] = 1024,
    tolerance: Annotated[float, typer.Option(min=0, help="Points of top-1 that the recommended pick may cost.")] = 5.0,
    profile: Annotated[bool, typer.Option(help="Profile the layers for the report.")] = True,
    latency: Annotated[bool, typer.Option(help="Measure the throughput after each pick.")] = True,
    cache: Annotated[Cache, typer.Option(help="Where embedded images stay between rounds.")] = Cache.auto,
    cache_budget: Annotated[str, typer.Option(help="What they may take: 8G.", show_default=False)] = "",
    cache_dir: Annotated[Path | None, typer.Option(help="For disk.", show_default=False)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the progress of an earlier run.")] = False,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Pick the attention layers whose removal changes the output least, try each pick, and report.

    Under torchrun the images are shared out; the same command goes on where an earlier one was stopped.
    """
    from lambda_kernels.files import check_writable

    from ..runtime import progress
    from ..runtime.processes import ended_in_order, local_device, process_group
    from ..selection.budget import Budget
    from ..selection.result import SelectionWarning
    from ..selection.search import check_search, run_selection
    from .models import open_model

    console = make_console()
    excluded, given = parse_indices(exclude, "--exclude"), parse_indices(layers, "--layers")
    budget = Budget(count, params, flops, throughput)
    named = "nose-signed" if signed and strategy is Strategy.nose else strategy.value
    # These raise before anything is loaded.
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
    with process_group() as processes, ended_in_order(), contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(progress.progress_bars())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", SelectionWarning)  # the selection lists them, and they are printed with it
        network = open_model(model, weights=weights, pretrained=pretrained, device=local_device(device))
        shard = (processes.rank, processes.size)
        loading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "skip_bad": skip_bad, "shard": shard}
        labelled = strategy is Strategy.accuracy
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
        bad = sorted({path for paths in processes.gather([*loader.bad, *trial["loader"].bad] if trial else loader.bad)
                      for path in paths})  # fmt: skip
    if not processes.is_main:
        return
    own = ["--model", model, *make_weights_options("--", weights, pretrained)]
    reference = ["--reference", model, *make_weights_options("--reference-", weights, pretrained)]
    checking = ["--data", data, *_validation_options(trial, class_map, skip_bad)]
    if not network.num_classes or (trial is not None and not trial["labelled"]):
        checking = None
    training = ["--data", data, *(["--skip-bad", skip_bad] if skip_bad else [])]
    commands = _next_commands(
        selection, record["trajectory"], selection_file, folder, own, training, reference, checking
    )
    _report(
        console, folder, selection_file, network, model, selection, record, engine, commands,
        [*trial_notes, *record["notes"]], _described(data, loader, trial),
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
) -> tuple[dict[str, Any] | None, list[str]]:
    """The images that picks are tried on, and what to say of them."""
    if not eval_samples:
        return None, []
    if not network.num_classes:
        return None, ["The picks were not tried out: the model has no classifier, hence no answers to compare"]
    notes: list[str] = []

    def opened(name: str) -> tuple[ImageLoader, bool]:
        try:
            return open_data(network, data, name, eval_samples, **loading, labelled=True, class_map=class_map), True
        except ValueError as error:
            if class_map is not None:
                raise
            # Without labels that mean the model's classes there is still the agreement with the full model.
            found = open_data(network, data, name, eval_samples, **loading)
            notes.append(f"Accuracy was not measured: {error}")
            return found, False

    try:
        found, labelled = opened(eval_split)
    except ValueError as error:
        notes = [f"The picks were tried on the images they were measured on: {error}"]
        found, labelled = opened(split)
    held_out = found.dataset.at != loader.dataset.at
    return {"loader": found, "labelled": labelled, "split": found.dataset.split, "held_out": held_out}, notes


def _measure(
    network: nn.Module,
    selection: Selection,
    loader: ImageLoader,
    trial: dict[str, Any] | None,
    processes: Processes,
    profile: bool,
    throughput_batch: int | None,
    tolerance: float,
    bins: int,
) -> dict[str, Any]:
    """The trajectory and the layer profile of a record; the same in all processes."""
    from ..data.loader import make_loader, subset
    from ..measure.layer_profile import profile_layers
    from ..report.records.recommendation import add_recommendation
    from ..selection.trajectory import caught, measure_trajectory

    record: dict[str, Any] = {"trajectory": None, "profile": None, "notes": []}
    if trial is not None:
        trajectory = measure_trajectory(
            network, trial["loader"], selection, split=trial["split"], held_out=trial["held_out"],
            labelled=trial["labelled"], throughput_batch=throughput_batch, bins=bins,
            processes=processes,
        )  # fmt: skip
        record["trajectory"] = add_recommendation(trajectory, selection, tolerance)
    if profile:
        with processes.all_or_none("Profile"):
            if processes.is_main:
                few = subset(loader.dataset, min(PROFILE_IMAGES, len(loader.dataset)))
                images = make_loader(few, loader.batch_size, workers=loader.workers, skip_bad=loader.skip_bad)
                found, record["notes"] = caught(lambda: profile_layers(network, images))
                record["profile"] = found.to_dict()
    return record


def _data_of(loader: ImageLoader, trial: dict[str, Any] | None) -> dict[str, Any]:
    """What all processes have to have opened alike: each sees its own disks."""
    from ..data.fingerprints import data_fingerprint

    found = {f"picked on, {name}": value for name, value in data_fingerprint(loader).items()}
    if trial is not None:
        tried = data_fingerprint(trial["loader"], labelled=trial["labelled"])
        tried |= {name: trial[name] for name in ("split", "labelled", "held_out")}
        found |= {f"tried on, {name}": value for name, value in tried.items()}
    return found


def _described(data: Path, loader: ImageLoader, trial: dict[str, Any] | None) -> dict[str, Any]:
    found = {"description": str(data), "calibration": len(loader.dataset)}
    return found if trial is None else found | {"validation": len(trial["loader"].dataset)}


def _validation_options(trial: dict[str, Any] | None, class_map: Path | None, skip_bad: int) -> list[object]:
    """What `validate` needs to be told to read the images that the picks were tried on."""
    split = trial["split"] if trial is not None else "val"
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
    """What to type next: for the recommended layers where there are any, else for all that were picked.

    `own` and `reference` say which model, `training` and `checking` on which images; no `checking` where these have no
    labels that are the model's classes.
    """
    step = trajectory["recommended"]["step"] if trajectory else 0
    chosen = ["--selection", selection_file]
    which = "the picked layers"
    if 0 < step < len(selection.layers):
        chosen = ["--remove", ",".join(map(str, selection.layers[:step]))]
        which = "the recommended layers"
    small = folder / "model"
    entries = [(f"What training without {which} takes", ["plan", *own, *chosen, *training])]
    if checking is not None:
        at = checking.index("--class-map") if "--class-map" in checking else len(checking)
        run = [*checking[at : at + 2], "--recipe", "short", "--out", folder / "finetune"]
        entries.append((f"Fade {which} out, delete them, and train on", ["finetune", *own, *chosen, *training, *run]))
    entries.append((f"Remove {which} now, with nothing trained", ["convert", *own, *chosen, "--out", small]))
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
