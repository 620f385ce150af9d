"""`lambda-vit plan`: computes before training what a removal saves and what its training costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..report.tables import plan_notes, plan_table
from .app import app, make_console, print_next
from .models import check_made_for, make_weights_options, read_layers
from .options import (
    Device,
    JsonFile,
    Model,
    Pretrained,
    Recompute,
    Remove,
    SelectionFile,
    SkipBad,
    Teacher,
    UseEma,
    Weights,
    Workers,
    check_outputs,
    print_bad,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data.loader import ImageLoader


@app.command()
def plan(
    model: Model,
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder or zip with train/<class>/*, to count the images and time their loading.", show_default=False
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of images per epoch, instead of --data; 1281167 for ImageNet.", show_default=False
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Total training epochs.", show_default="400")] = None,
    dilution_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs over which the attention fades.", show_default="none of --epochs")
    ] = None,
    recovery_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs after the attention is removed.", show_default="the rest")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step and device.")] = 64,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices; assumed to scale linearly.")] = 1,
    recompute: Annotated[
        Recompute | None,
        typer.Option(
            help="What training steps recompute in fused MLPs instead of saving it.", show_default="the model's own"
        ),
    ] = None,
    teacher: Teacher = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time budget for all measurements, in seconds.")] = 60.0,
    out: JsonFile = None,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Estimate what removing attention layers saves, and the memory and hours that its training requires."""
    from lambda_kernels.files import write_json

    from ..models.properties import why_no_classes
    from ..runtime import environment, progress
    from ..training.plan.planning import plan_training, split_epochs
    from .models import check_device, open_model

    chosen = read_layers(selection, remove)
    if (data is None) == (images is None):
        raise ValueError(
            "pass either --data FOLDER or --images COUNT: the hours depend on the number of images per epoch"
        )
    dilution, recovery = split_epochs(epochs, dilution_epochs, recovery_epochs)
    check_outputs(out)
    where = check_device(device)
    with progress.progress_bars():
        network = open_model(model, weights=weights, use_ema=use_ema, pretrained=pretrained, device="cpu")
        if selection is not None and not isinstance(chosen, tuple):
            check_made_for(chosen, selection, network, model)
        loader = None if data is None else _training_loader(network, data, batch_size, workers, skip_bad, where.type)
        result = plan_training(
            network,
            chosen,
            images=images if loader is None else len(loader.dataset),
            dilution_epochs=dilution,
            recovery_epochs=recovery,
            batch_size=batch_size,
            devices=devices,
            seconds=seconds,
            device=where,
            loader=loader,
            recompute=None if recompute is None else recompute.value,
            teacher=None if teacher is None else _build_teacher(teacher, network),
        )
    console = make_console()
    removed = ", ".join(map(str, result.removed))
    console.print(f"{model} without the attention of blocks {removed} of 0–{result.depth - 1}", soft_wrap=True)
    console.print(plan_table(result))
    for line in plan_notes(result):
        console.print(line, soft_wrap=True)
    if loader is not None:
        print_bad(console, loader.bad)
    if out is not None:
        versions = environment.versions()
        record = {"model": model, "command": environment.command_line(), "environment": versions, **result.to_dict()}
        write_json(out, record)
        console.print(f"Written: {out}", soft_wrap=True)
    layers = ["--remove", remove] if selection is None else ["--selection", selection]
    own = ["--model", model, *make_weights_options("--", weights, use_ema, pretrained), *layers]
    length = ["--epochs", dilution + recovery, *(["--dilution-epochs", dilution] if dilution else [])]
    length += ["--batch-size", batch_size * devices]
    length += [] if recompute is None else ["--recompute", recompute.value]
    if why_no_classes(network) is not None:
        length += ["--num-classes", "N" if loader is None else len(loader.dataset.classes)]
    if teacher is not None:
        length += ["--distillation", "soft"]
    if teacher not in (None, model):
        length += ["--teacher", teacher, *([] if Path(teacher).is_dir() else ["--teacher-pretrained"])]
    print_next(console, "finetune", *own, "--data", data or "path/to/images", *length, "--out", "runs/finetune")


def _build_teacher(name: str, network: nn.Module) -> nn.Module:
    """The teacher `name` with random weights, which take as long as others."""
    import timm

    from lambda_kernels import from_pretrained

    if Path(name).is_dir():
        return from_pretrained(name)
    if not timm.is_model(name):
        raise ValueError(f"--teacher {name!r} is neither a saved folder nor a timm model. See timm.list_models()")
    return timm.create_model(name, pretrained=False, num_classes=network.num_classes).eval()


def _training_loader(
    network: nn.Module, data: Path, batch_size: int, workers: int, skip_bad: int, device: str
) -> ImageLoader:
    from ..data.images import open_images
    from ..data.loader import make_loader
    from ..data.transforms import transforms_for

    dataset = open_images(data, "train", transform=transforms_for(network, training=True))
    return make_loader(
        dataset, batch_size, workers=workers, shuffle=True, skip_bad=skip_bad, pin_memory=device == "cuda"
    )
