"""What the commands of `lambda-vit` share: the application, the types of their options, and how they open and print."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lambda_kernels.files import check_writable

from ..report.figures.files import PLOT_SUFFIXES, plot_format

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..data.loader import ImageLoader


Model = Annotated[str, typer.Option(help="timm's name of the model, or a folder saved by convert.", show_default=False)]

Weights = Annotated[Path | None, typer.Option(help="State dict, .safetensors or .pth.", show_default=False)]

Pretrained = Annotated[bool, typer.Option("--pretrained", help="Take timm's own weights from the hub.")]

# The layers to remove, one way or the other; `chosen_layers` reads them.
SelectionFile = Annotated[
    Path | None,
    typer.Option(help="What select wrote, or the folder that holds it as selection.json.", show_default=False),
]

Remove = Annotated[str, typer.Option(help="Block indices instead: 1,5,4,11.", show_default=False)]

Data = Annotated[Path, typer.Option(help="Folder or zip with train/<class>/* and val/<class>/*.", show_default=False)]

Samples = Annotated[int, typer.Option(min=1, help="Images to measure on, spread evenly over the classes.")]

BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward.")]

Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")]

ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="JSON: class folder → output of the model, where neither names nor number tell.", show_default=False
    ),
]

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
    nose_signed = "nose-signed"
    one_shot = "one-shot"
    kl = "kl"
    accuracy = "accuracy"
    cosine = "cosine"
    random = "random"
    first = "first"
    explicit = "explicit"


class Cache(str, enum.Enum):
    """Of embedded images."""

    auto = "auto"
    ram = "ram"
    disk = "disk"
    none = "none"


class Recompute(str, enum.Enum):
    """Of activations, in the MLP halves of the blocks."""

    auto = "auto"
    none = "none"
    act = "act"
    all = "all"


class Score(str, enum.Enum):
    """Where the entropy is measured."""

    logits = "logits"
    pre_logits = "pre_logits"


def open_data(
    model: nn.Module,
    data: Path,
    split: str,
    samples: int | None,
    batch_size: int,
    workers: int,
    skip_bad: int,
    *,
    labelled: bool = False,
    class_map: Path | None = None,
    shard: tuple[int, int] = (0, 1),
) -> ImageLoader:
    """A loader; unless it is `labelled`, class folders only spread the samples and need not be the model's classes."""
    from ..data.images import open_images
    from ..data.loader import make_loader, subset
    from ..data.transforms import transforms_for

    classes = model.num_classes or None if labelled else None
    mapping = None if class_map is None else read_class_map(class_map)
    dataset = open_images(data, split, transform=transforms_for(model), num_classes=classes, class_to_idx=mapping)
    if samples is not None and samples < len(dataset):
        dataset = subset(dataset, samples)
    return make_loader(dataset, batch_size, workers=workers, skip_bad=skip_bad, shard=shard)


def read_class_map(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--class-map {path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise ValueError(f'--class-map {path} must hold an object such as {{"cat": 281, "dog": 207}}')
    return found


def print_bad(console: Console, paths: Iterable[str]) -> None:
    for path in paths:
        console.print(f"unreadable image omitted: {path}", style="yellow", soft_wrap=True)


def parse_indices(text: str, option: str) -> tuple[int, ...]:
    """Block indices out of "1,5,4,11".

    Raises:
        ValueError: Something in it is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} takes block indices such as 1,5,4,11; got {text!r}") from None


def parse_bytes(text: str, option: str) -> int | None:
    """Bytes out of "8G", "512MiB" or "1000000"; None out of "".

    Raises:
        ValueError: It is no such thing.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{option} takes a size such as 8G, 512M or a number of bytes; got {text!r}")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


def check_outputs(out: Path | None, plot: Path | None = None) -> None:
    """Raise before the work whose results could not be written: a record to `out`, a figure to `plot`.

    Raises:
        ValueError: A suffix does not fit, or a path is a folder.
        OSError: A place cannot be written to.
    """
    if plot is not None:
        plot_format(plot)
    if out is not None and out.suffix.lower() in PLOT_SUFFIXES:
        raise ValueError(f"--out writes JSON; got {str(out)!r}. A figure is drawn with --plot")
    for path in filter(None, (out, plot)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        check_writable(path)
