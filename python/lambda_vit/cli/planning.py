"""`lambda-vit plan`: what a removal saves and what the training for it costs, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .command_options import (
    Device,
    Model,
    Pretrained,
    Recompute,
    Remove,
    SelectionFile,
    SkipBad,
    Weights,
    Workers,
    app,
    check_made_for,
    chosen_layers,
    make_console,
    print_next,
    report_bad,
    weights_options,
)

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from .data import ImageLoader
    from .planning import NetworkPlan, Plan

Epochs = Annotated[Optional[int], typer.Option(min=1, help="In all.", show_default="400")]  # noqa: UP045


@app.command()
def plan(
    model: Model,
    weights: Weights = None,
    pretrained: Pretrained = False,
    selection: SelectionFile = None,
    remove: Remove = "",
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder or zip with train/<class>/*: counted, and timed while loading.", show_default=False),
    ] = None,
    images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Instead of --data: images of one epoch, ImageNet: 1281167.", show_default=False),
    ] = None,
    epochs: Epochs = None,
    dilution_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="While attention fades.", show_default="three quarters"),
    ] = None,
    recovery_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="After that, without it.", show_default="the rest"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step and device.")] = 64,
    devices: Annotated[int, typer.Option(min=1, help="That share the training; taken to scale linearly.")] = 1,
    recompute: Annotated[
        Optional[Recompute],  # noqa: UP045
        typer.Option(
            help="What steps compute again in MLP halves instead of saving it.", show_default="as the model is"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Budget for all timing.")] = 60.0,
    out: Annotated[Optional[Path], typer.Option(help="Write JSON here.", show_default=False)] = None,  # noqa: UP045
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Dry run: what removing attention layers saves, and the memory and hours that the training for it takes."""
    from lambda_kernels.files import write_json

    from . import environment, progress
    from .loading import check_device, open_model
    from .planning import plan_training, split_epochs
    from .plot_files import check_outputs

    chosen = chosen_layers(selection, remove)
    if (data is None) == (images is None):
        raise ValueError("pass either --data FOLDER or --images COUNT: hours depend on how many images an epoch has")
    dilution, recovery = split_epochs(epochs, dilution_epochs, recovery_epochs)
    check_outputs(out)
    where = check_device(device)
    with progress.shown():
        network = open_model(model, weights=weights, pretrained=pretrained, device="cpu")
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
        )
    console = make_console()
    removed = ", ".join(map(str, result.removed))
    console.print(f"{model} without the attention of blocks {removed} of 0–{result.depth - 1}", soft_wrap=True)
    console.print(plan_table(result))
    for line in plan_notes(result):
        console.print(line, soft_wrap=True)
    if loader is not None:
        report_bad(console, loader)
    if out is not None:
        versions = environment.versions()
        record = {"model": model, "command": environment.command_line(), "environment": versions, **result.to_dict()}
        write_json(out, record)
        console.print(f"Written: {out}", soft_wrap=True)
    layers = ["--remove", remove] if selection is None else ["--selection", selection]
    own = ["--model", model, *weights_options("--", weights, pretrained), *layers]
    length = ["--epochs", dilution + recovery, "--dilution-epochs", dilution, "--batch-size", batch_size * devices]
    length += [] if recompute is None else ["--recompute", recompute.value]
    print_next(console, "finetune", *own, "--data", data or "path/to/images", *length, "--out", "runs/finetune")


def _training_loader(
    network: nn.Module, data: Path, batch_size: int, workers: int, skip_bad: int, device: str
) -> ImageLoader:
    from .data import make_loader, open_images, transforms_for

    dataset = open_images(data, "train", transform=transforms_for(network, training=True))
    return make_loader(
        dataset, batch_size, workers=workers, shuffle=True, skip_bad=skip_bad, pin_memory=device == "cuda"
    )


def plan_table(result: Plan) -> Table:
    """The three networks side by side, and the change from the full one to the final one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .units import NONE, change_of

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("full", "diluting", "without", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    networks = [result.networks[name] for name in ("full", "diluting", "final")]
    for name, value, show in _rows(result):
        values = [value(network) for network in networks]
        if not any(values):
            continue
        change = change_of(values[0], values[2]) if None not in values else NONE
        cells = [NONE if v is None else show(v) for v in values]
        # Text, not str: rich would take brackets for markup.
        table.add_row(*map(Text, (name, *cells, change)))
    return table


def _rows(result: Plan) -> Iterator[tuple[str, Callable[[NetworkPlan], float | None], Callable[[float], str]]]:
    from .units import count, milliseconds, size, three

    batch = result.batch_size
    yield "parameters", lambda n: n.parameters, count
    yield "FLOPs of a forward, per image", lambda n: n.flops, count
    yield "weights", lambda n: n.weight_bytes, size
    yield "gradients", lambda n: n.gradient_bytes, size
    yield "AdamW's state", lambda n: n.optimizer_bytes, size
    yield "saved for backward, per image", lambda n: n.saved_bytes_per_image, size
    yield "saved for backward, fixed", lambda n: n.saved_bytes_fixed, size
    yield f"memory of a step, batch {batch}", lambda n: n.step_bytes, size
    yield "  measured peak", lambda n: n.peak_bytes, size
    yield f"time of a step, batch {batch}", lambda n: n.step.median_ms if n.step else None, milliseconds
    yield "  images per second", lambda n: 1000 * batch / n.step.median_ms if n.step else None, three


def _recomputing(result: Plan) -> list[str]:
    """What the networks compute again in the backward, where one does."""
    parts = []
    for name, title in (("full", "full"), ("diluting", "diluting"), ("final", "without")):
        levels = [level for level in result.networks[name].recomputed if level != "none"]
        for level in dict.fromkeys(levels):
            parts.append(f"{title}: {level!r} in {levels.count(level)} of {result.depth} blocks")
    if not parts:
        return []
    return [
        f"- Computed again in the backward instead of saved, of MLP halves alone: {'; '.join(parts)}. The time of a step holds "
        "it; what one block needs for it at a time is scratch memory."
    ]


def plan_notes(result: Plan) -> list[str]:
    """Hours of each phase, what limits them, and what the numbers rest on."""
    from .planning import COUNTED_AT
    from .units import hours, milliseconds, size, three

    lines = []
    names = {"dilution": ("Dilution", "diluting"), "recovery": ("Without attention", "final")}
    for phase, times in result.phases.items():
        title, network = names[phase]
        step = result.networks[network].step
        lines.append(
            f"{title}: {hours(times.hours)} for {times.epochs} epochs of {times.steps // times.epochs:,} steps, "
            f"{milliseconds(step.median_ms)} each (quartiles of {step.rounds} steps {three(step.low_ms)}–"
            f"{three(step.high_ms)} ms: {hours(times.low_hours)} to {hours(times.high_hours)})"
        )
    phases = result.phases.values()
    lines.append(
        f"In all: {hours(sum(p.hours for p in phases))} of training steps on {result.devices} × {result.device}"
    )
    if result.loading is not None:
        speed = result.loading.images_per_second
        how = (
            f"with --workers {result.loading.workers}"
            if result.loading.workers
            else "without workers, so that training waits for it"
        )
        lines.append(
            f"Loading: {speed:,.0f} images per second ({how}; {result.loading.images:,} timed). The slower one is "
            f"{result.limited_by}; both together: {hours(sum(p.hours_with_loading for p in phases))}"
        )
    shape = "×".join(map(str, result.input_shape))
    lines += [
        "",
        "What this rests on:",
        f"- {result.images:,} images per epoch, {result.batch_size} per step and device; the last step of an epoch counts "
        "in full.",
        f"- Steps were timed here on random {result.dtype} images of {shape}: forward, loss, backward, clipping, AdamW.",
        "- " + ("Loading was timed alone, with timm's random crops and flips." if result.loading else "Loading images is")
        + ("" if result.loading else " left out; --data measures it.") + " Validation and checkpoints are left out.",
        f"- Saved for backward: what autograd keeps of forwards of {COUNTED_AT[0]} and {COUNTED_AT[1]} images, each storage "
        "once, weights left out.",
        "- Memory of a step: weights, gradients, AdamW's two float32 per trainable parameter, and what is saved. Scratch "
        "memory inside operators comes on top.",
        *_recomputing(result),
    ]  # fmt: skip
    unsteady = max(n.step.high_ms / n.step.low_ms for n in result.networks.values() if n.step)
    if unsteady > 1.5:
        lines.append(
            f"- The quartiles of the step times are a factor of {three(unsteady)} apart: something else was using this "
            "machine. Repeat it while that is quiet."
        )
    if result.devices > 1:
        lines.append(
            f"- {result.devices} devices are taken to be exactly {result.devices} times as fast as one; nothing was "
            "measured on more than one."
        )
    peak = result.networks["diluting"].peak_bytes
    if peak is None:
        lines.append("- The real peak is measured on CUDA only.")
    elif peak > result.networks["diluting"].step_bytes:
        over = peak - result.networks["diluting"].step_bytes
        lines.append(f"- The measured peak is {size(over)} above the count: scratch memory of operators.")
    return lines
