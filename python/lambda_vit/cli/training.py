"""`lambda-vit finetune` and `report`: train a model while its selected attention is removed, and report on the run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.recipe import Recipe, list_recipes, load_recipe
from .app import app, make_console, print_next
from .models import check_made_for, make_weights_options, read_layers
from .options import (
    ClassMap,
    Device,
    Model,
    Pretrained,
    Remove,
    SelectionFile,
    SkipBad,
    Teacher,
    UseEma,
    Weights,
    Workers,
    print_bad,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.images.stream import TrainingStream
    from ..training.run import FinetuningRun


def overrides(flags: Mapping[str, str | bool | None]) -> dict[str, Any]:
    """Select the flags that were given, and read numbers in their text, for `load_recipe`."""
    return {name: _read(name, value) for name, value in flags.items() if value is not None}


def _read(name: str, value: str | bool) -> Any:
    if isinstance(value, bool):
        return value
    parts = [_plain(part.strip()) for part in value.split(",")]
    return parts if len(parts) > 1 or name == "freeze" else parts[0]


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # "none" too, which a field that may be None understands


def _format_default(default: object) -> str | bool:
    if default is None or default == ():
        return False
    return ",".join(f"{v:g}" for v in default) if isinstance(default, tuple) else str(default)


def _metavar(field: dataclasses.Field) -> str | None:
    choices = field.metadata["choices"] or ()
    if 0 < len(choices) <= 4:  # more would leave no room for the help beside them
        return f"[{'|'.join(choices)}]"
    kind = field.type.removesuffix(" | None")
    return {"int": "INTEGER", "float": "FLOAT", "bool": None}.get(kind, "TEXT")


def _list_recipes(requested: bool) -> None:
    if requested:
        for name, description in list_recipes().items():
            typer.echo(f"{name:12} {description}")
        raise typer.Exit


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the `**flags` of a typer command by one flag per field of `Recipe`; it receives the text of those given."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = []
    for field in dataclasses.fields(Recipe):
        name, kind = field.name.replace("_", "-"), bool | None if field.type == "bool" else str | None
        option = typer.Option(
            None,
            f"--{name}/--no-{name}" if field.type == "bool" else f"--{name}",
            help=field.metadata["help"],
            rich_help_panel=field.metadata["panel"],
            show_default=_format_default(field.default),
            metavar=_metavar(field),
        )
        flags.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]  # for inspect
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


@app.command()
@with_recipe_flags
def finetune(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Folder or zip with train/<class>/* and val/<class>/*, or hfds/NAME, or wds/PATH.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Output folder of the run; an existing run is resumed.", show_default=False)
    ],
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    recipe: Annotated[
        str | None,
        typer.Option(help="Name of a shipped recipe, or a YAML file; flags override its fields.", show_default=False),
    ] = None,
    recipes: Annotated[
        bool,
        typer.Option(
            "--list-recipes", callback=_list_recipes, is_eager=True, help="List the shipped recipes and exit."
        ),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train the full model, with all its attention.")] = False,
    teacher: Teacher = None,
    teacher_weights: Annotated[
        Path | None,
        typer.Option(help="Weights of the teacher: a state dict in .safetensors or .pth.", show_default=False),
    ] = None,
    teacher_pretrained: Annotated[
        bool, typer.Option("--teacher-pretrained", help="Download timm's pretrained weights of the teacher.")
    ] = False,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of outputs of a new classifier, which replaces the model's.", show_default=False
        ),
    ] = None,
    val_data: Annotated[
        str | None, typer.Option(help="Folder or zip with val/<class>/*, if not in --data.", show_default=False)
    ] = None,
    class_map: ClassMap = None,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Discard an earlier run in --out and start over.")] = False,
    keep: Annotated[int, typer.Option(min=1, help="Number of checkpoints to retain.")] = 2,
    log_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between two rows of log.jsonl.")] = 50,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write a TensorBoard log.")] = False,
    **flags: Any,
) -> None:
    """Remove the selected attention of a model, at once or while it trains, and save the evaluated smaller model.

    If the run is interrupted, run the same command again to resume. Under torchrun the processes share the steps.
    """
    from lambda_kernels.files import check_writable

    from ..data.labels import read_class_map
    from ..report.page import write_training_report
    from ..runtime import progress
    from ..runtime.processes import local_device, process_group
    from ..training.loop.model_setup import replace_classifier
    from ..training.run import run_finetuning
    from ..training.storage.log import check_tensorboard
    from .models import open_model

    if full and (selection is not None or remove):
        raise ValueError("--full removes nothing: omit --selection and --remove")
    chosen = () if full else read_layers(selection, remove)
    settings = load_recipe(recipe, overrides(flags))
    if num_classes is not None and settings.needs_teacher and teacher is None:
        raise ValueError(
            f"distillation with --num-classes {num_classes}: the teacher would be a model with an untrained classifier. Train "
            "that model with --full first, and pass the result to --model or --teacher"
        )
    if teacher is not None and not settings.needs_teacher:
        raise ValueError(f"--teacher {teacher} has no part in the loss: add --distillation soft, or omit --teacher")
    if teacher is None and (teacher_weights is not None or teacher_pretrained):
        raise ValueError("--teacher-weights and --teacher-pretrained require --teacher NAME")
    if (out / "selection.json").exists():
        raise ValueError(f"--out {out} holds a selection, whose report would be lost: use another folder")
    mapping = None if class_map is None else read_class_map(class_map)
    check_writable(out / "run.json")
    if tensorboard:
        check_tensorboard()
    console = make_console()
    with process_group(training=True) as processes, contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(progress.progress_bars())
        # One choice for both files; the model may have none, as a folder does.
        copy = use_ema if weights is not None or teacher_weights is None else None
        network = open_model(model, weights=weights, use_ema=copy, pretrained=pretrained, device=local_device(device))
        guide = None
        if teacher is not None:
            guide = open_model(
                teacher,
                weights=teacher_weights,
                use_ema=use_ema if teacher_weights is not None else None,
                pretrained=teacher_pretrained,
                device=local_device(device),
                option="--teacher",
                removable=False,
            )
        if num_classes is not None:
            replace_classifier(network, num_classes, settings.seed)
        if selection is not None and not isinstance(chosen, tuple):
            check_made_for(chosen, selection, network, model)
        loading = {
            "class_map": mapping,
            "workers": workers,
            "skip_bad": skip_bad,
            "new_classifier": num_classes is not None,
            "processes": processes,
        }
        run = run_finetuning(
            network,
            settings,
            lambda network, recipe: _open_data(data, network, recipe, val_data=val_data, **loading),
            layers=chosen,
            out=out,
            processes=processes,
            teacher=guide,
            restart=restart,
            keep=keep,
            log_every=log_every,
            tensorboard=tensorboard,
            new_classifier=num_classes is not None,
            log_fn=lambda line: console.print(line, soft_wrap=True),
            report=write_training_report,
        )
    if processes.is_main:
        print_bad(console, run.record["unreadable"])
        _print_outcome(console, run, restart)
        images = data if val_data is None else val_data
        if not run.stopped and not images.startswith(("hfds/", "wds/")):
            following = ["validate", "--model", out / "model"]
            if num_classes is None and settings.img_size is None:  # otherwise its classes or its input size differ
                following += ["--reference", model, *make_weights_options("--reference-", weights, use_ema, pretrained)]
            following += ["--data", images, *([] if class_map is None else ["--class-map", class_map])]
            print_next(console, *following)
    if run.stopped:
        raise typer.Exit(run.exit_code)


def _open_data(*arguments: Any, **options: Any) -> tuple[TrainingStream, Iterable]:
    from ..training.images.opening import open_training_data

    try:
        return open_training_data(*arguments, **options)
    except ValueError as error:
        if "num_classes" in str(error):
            raise ValueError(f"{error}. To train a new classifier, pass --num-classes") from error
        raise


def _print_outcome(console: Console, run: FinetuningRun, restart: bool) -> None:
    record = run.record
    if run.stopped:
        console.print(
            f"Stopped by signal {run.stopped} after {record['position']:,} of {record['steps']:,} steps. To resume, run the "
            f"same command again{' without --restart' if restart else ''}",
            soft_wrap=True,
        )
        return
    result, best, sizes = record["result"], record["best"], record["model"]["parameters"]
    if (removal := record["boundary"]) is not None:
        end = "λ reached 0 after {:,} steps: removing the attention"
        if record["recipe"]["removal"] == "progressive":
            end = "The last attention was switched off after {:,} steps: deleting it"
        console.print(
            f"{end.format(removal['step'])} changed no logit by more than {removal['difference']:.1e} (bound "
            f"{removal['bound']:.1e})",
            soft_wrap=True,
        )
    low, high = result["top1_interval"]
    weights = {"model": "the weights", "ema": "the averaged weights"}[best["weights"]]
    console.print(
        f"{sizes['before']:,} → {sizes['after']:,} parameters. Top-1 {result['top1']:.2f} % ({low:.1f}–{high:.1f}) on "
        f"{result['images']:,} images, measured on the saved model: {weights} of epoch {best['epoch']}",
        soft_wrap=True,
    )
    console.print(f"Model:   {run.folder / 'model'}/\nReport:  {run.folder / 'report.html'}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of the run: the --out of finetune.", show_default=False)],
) -> None:
    """Write the report of a fine-tuning run from its log, also while it runs or after it was interrupted."""
    from ..report.page import console_summary, write_report
    from ..report.records.training import training_record

    record = training_record(folder)
    paths = write_report(record, folder)
    console = make_console()
    console.print(console_summary(record))
    console.print(f"Written: {paths['html']}", soft_wrap=True)
