"""Options that several commands share: their types, their help, and how their text is read."""

from __future__ import annotations

import enum
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

Model = Annotated[
    str, typer.Option(help="Name of a timm model, or a folder that convert or finetune saved.", show_default=False)
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights of the model: a state dict in .safetensors or .pth.", show_default=False)
]
UseEma = Annotated[
    bool | None,
    typer.Option(
        "--use-ema/--no-ema",
        help="Use the average (EMA) of the weights in a file that also holds the trained weights.",
        show_default="the average, if there is one",
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download timm's pretrained weights.")]
# The layers to remove, one way or the other; `read_layers` reads them.
SelectionFile = Annotated[
    Path | None,
    typer.Option(help="Layers to remove: the selection.json that select wrote, or its folder.", show_default=False),
]
Remove = Annotated[
    str, typer.Option(help="Layers to remove, as block indices instead of --selection: 1,5,4,11.", show_default=False)
]
Data = Annotated[Path, typer.Option(help="Folder or zip with train/<class>/* and val/<class>/*.", show_default=False)]
Samples = Annotated[int, typer.Option(min=1, help="Number of images to measure, spread evenly over the classes.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Number of processes that decode images; 0 decodes in the main process.")
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help='Output of each class: a JSON file such as {"cat": 281}, or a .txt with one class per line, in output order.',
        show_default=False,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Teacher of the distillation: a timm model or a saved folder with the same classes.", show_default=False
    ),
]
SkipBad = Annotated[int, typer.Option(min=0, help="Number of unreadable images to skip before the command fails.")]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1 …")]

Split = Annotated[str, typer.Option(help="Split of the images to measure.")]

JsonFile = Annotated[
    Path | None, typer.Option("--out", help="Write the results to this JSON file.", show_default=False)
]

Plot = Annotated[
    Path | None, typer.Option(help="Draw the results to this file: .png, .svg or .pdf.", show_default=False)
]

Bins = Annotated[int, typer.Option(min=2, max=65536, help="Number of bins of a channel's histogram.")]


class Estimator(str, enum.Enum):
    """Estimators of an entropy."""

    gaussian = "gaussian"
    histogram = "histogram"


class Estimators(str, enum.Enum):
    """Estimators of a profile, which computes both in one pass."""

    both = "both"
    gaussian = "gaussian"
    histogram = "histogram"


class Cache(str, enum.Enum):
    """Where a search keeps activations between rounds."""

    auto = "auto"
    ram = "ram"
    disk = "disk"
    none = "none"


class Recompute(str, enum.Enum):
    """What a training step recomputes in the MLP halves of blocks."""

    auto = "auto"
    none = "none"
    act = "act"
    all = "all"


class Score(str, enum.Enum):
    """Outputs whose entropy is measured."""

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
    """Open images as a loader for `model`.

    Without `labelled`, the class folders only spread the samples: they need not be the model's classes.
    """
    from ..data.images import open_images
    from ..data.labels import read_class_map
    from ..data.loader import make_loader, subset
    from ..data.transforms import transforms_for
    from ..models.properties import get_class_names

    classes = model.num_classes or None if labelled else None
    dataset = open_images(
        data,
        split,
        transform=transforms_for(model),
        num_classes=classes,
        class_to_idx=None if class_map is None else read_class_map(class_map),
        class_names=get_class_names(model) if labelled else None,
    )
    if samples is not None and samples < len(dataset):
        dataset = subset(dataset, samples)
    return make_loader(dataset, batch_size, workers=workers, skip_bad=skip_bad, shard=shard)


def print_bad(console: Console, paths: Iterable[str]) -> None:
    for path in paths:
        console.print(f"unreadable image omitted: {path}", style="yellow", soft_wrap=True)


def parse_indices(text: str, option: str) -> tuple[int, ...]:
    """Read block indices such as "1,5,4,11".

    Raises:
        ValueError: A part of the text is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} expects block indices such as 1,5,4,11; got {text!r}") from None


def parse_bytes(text: str, option: str) -> int | None:
    """Read a number of bytes such as "8G", "512MiB" or "1000000"; "" gives None.

    Raises:
        ValueError: The text is not a size, or the size is 0.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{option} expects a size such as 8G, 512M or a number of bytes; got {text!r}")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


def check_outputs(out: Path | None, plot: Path | None = None) -> None:
    """Check before any work that the results can be written: a record to `out`, a figure to `plot`.

    Raises:
        ValueError: A suffix does not fit, or a path is a folder.
        OSError: A path cannot be written to.
    """
    if plot is not None:
        plot_format(plot)
    if out is not None and out.suffix.lower() in PLOT_SUFFIXES:
        raise ValueError(f"--out writes JSON; got {str(out)!r}. To draw a figure, use --plot")
    for path in filter(None, (out, plot)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        check_writable(path)
