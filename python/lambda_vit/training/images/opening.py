"""Opens what a model is trained on and validated on: folders and zips, sets of the Hugging Face hub, WebDataset shards."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...data.images import open_images
from ...data.loader import make_loader
from ...data.transforms import transforms_for
from ...models.properties import get_class_names, input_shape
from ...runtime.processes import Processes
from ...runtime.signals import spare_worker
from ..recipe import Recipe
from .stream import DatasetStream, TrainingStream

if TYPE_CHECKING:
    from PIL.Image import Image


def open_training_data(
    data: str | os.PathLike[str],
    model: nn.Module,
    recipe: Recipe,
    *,
    val_data: str | os.PathLike[str] | None = None,
    class_map: Mapping[str, int] | None = None,
    workers: int = 0,
    skip_bad: int = 0,
    prefetch: int = 2,
    val_batch_size: int | None = None,
    new_classifier: bool = False,
    processes: Processes | None = None,
) -> tuple[TrainingStream, Iterable[tuple[Tensor, Tensor]]]:
    """The images of a fine-tuning: a stream of the train split, and a loader of the val split.

    Labels follow the train split, or `class_map`; a val split with other classes is refused. If the recipe uses no labels,
    those of the train split are placeholders: its images may be in one folder.

    Args:
        data: A folder or a zip with `train/<class>/<image>` and `val/<class>/<image>`; `hfds/NAME`, a data set of the
            Hugging Face hub (or a folder of its making), `hfds/NAME#COLUMN` where it has several labels; `wds/PATH`,
            WebDataset shards, in a folder or behind an address.
        model: Says image size, channels, mean, std and the number of classes.
        recipe: Says how images are augmented, and how large steps are.
        val_data: Where the val split is, if not in `data`.
        class_map: Label of each class by name; None: as `data.labels.label_classes` finds them.
        workers: Processes that read and decode, for training and for validation; 0 does it in this one.
        skip_bad: How many different unreadable images to leave out before giving up, of each split and in each process.
        prefetch: Micro-batches that every worker has ready.
        val_batch_size: Images per forward of validation; None: as many as in a micro-batch.
        new_classifier: The model learns the order of the classes in this training, so that no warning about it is needed.
        processes: Those that share the work; None: this one alone. Both results give this process's share.

    Raises:
        ValueError: No such data or splits, classes that do not fit the model or differ between splits, another image
            size than the model's, less data than one step takes, or micro-batches that the processes cannot share.
        ImportError: A package is missing; the message has the command that installs it.
    """
    shard = (0, 1) if processes is None else (processes.rank, processes.size)
    # None, passed on, would stand for timm's default and not for the model's own.
    cropped: dict[str, Any] = {} if recipe.crop_pct is None else {"crop_pct": recipe.crop_pct}
    train, val = training_transform(model, recipe), transforms_for(model, **cropped)
    loading: dict[str, Any] = {"workers": workers, "skip_bad": skip_bad, "shard": shard, "pin_memory": True}
    naming = {
        "num_classes": getattr(model, "num_classes", None),
        "class_to_idx": class_map,
        "class_names": get_class_names(model),
    }
    unlabelled = {"num_classes": None, "class_to_idx": None, "class_names": None}  # labels that nothing reads
    quiet = "the labels follow timm's order" if new_classifier else None
    with _ignore(quiet):
        opened = _open(data, "train", train, naming if recipe.uses_labels else unlabelled)
    if hasattr(opened, "stream"):
        stream = opened.stream(recipe, prefetch=prefetch, **loading)
    else:
        stream = DatasetStream(opened, recipe, prefetch=prefetch, **loading)
    if val_data is None and getattr(opened, "split", None) == "all":
        raise ValueError(
            f"{os.fspath(data)} has no split folders: training and validation would be on the same images. Put them into "
            "train/<class>/ and val/<class>/, or say where the validation images are (--val-data, val_data in Python)"
        )
    batch = val_batch_size or stream.micro_batch_size
    labels = getattr(opened, "class_to_idx", None) if recipe.uses_labels else None
    # One folder or zip is compared with itself by open_images.
    if val_data is not None or os.fspath(data).startswith("hfds/"):
        naming["class_to_idx"] = class_map if labels is None else labels
    with _ignore(quiet):
        held_out = _open(data if val_data is None else val_data, "val", val, naming, same_classes=recipe.uses_labels)
    if missing := sorted(set(labels or ()) - set(getattr(held_out, "class_to_idx", labels or ()))):
        raise ValueError(
            f"the classes of the val split must be those of the train split: missing ({len(missing)}): "
            f"{', '.join(missing[:20])}. Complete the val split, or remove these classes from the train split"
        )
    if hasattr(held_out, "loader"):
        return stream, held_out.loader(batch, **loading)
    return stream, make_loader(held_out, batch, worker_init=spare_worker, **loading)


@contextlib.contextmanager
def _ignore(message: str | None) -> Iterator[None]:
    with warnings.catch_warnings():
        if message is not None:
            warnings.filterwarnings("ignore", message)
        yield


def training_transform(model: nn.Module, recipe: Recipe) -> Callable[[Image], Tensor]:
    """timm's training transform for a model, at its own size, mean and std, augmented as the recipe says.

    Raises:
        ValueError: The recipe asks for another image size than the model has.
    """
    sides = input_shape(model)[1:]
    if recipe.img_size is not None and sides != (recipe.img_size,) * 2:
        raise ValueError(
            f"img_size={recipe.img_size} and the model takes {sides[0]}×{sides[1]} pixels: call "
            f"model.set_input_size({recipe.img_size}) first"
        )
    transform = transforms_for(
        model,
        training=True,
        interpolation=recipe.train_interpolation,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.aa,
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
    )
    _let_posterize_blacken(transform)
    return transform


def _let_posterize_blacken(transform: Any) -> None:
    """At its highest level timm's posterize keeps no bit, which is black; newer releases of Pillow raise there."""
    from timm.data.auto_augment import posterize

    for part in transform.transforms:
        if hasattr(part, "transforms"):
            _let_posterize_blacken(part)
        for op in (*getattr(part, "ops", ()), *itertools.chain(*getattr(part, "policy", ()))):
            if getattr(op, "aug_fn", None) is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image, bits: int, **options: Any) -> Image:
    from PIL import Image
    from timm.data.auto_augment import posterize

    return Image.new(image.mode, image.size) if bits == 0 else posterize(image, bits, **options)


def _open(
    data: str | os.PathLike[str],
    split: str,
    transform: Callable[[Image], Tensor],
    naming: dict[str, Any],
    same_classes: bool = True,
) -> Any:
    """A dataset; or, of shards, what has a `stream` and a `loader`."""
    where = os.fspath(data)
    if where.startswith("hfds/"):
        from .hub import open_hub

        return open_hub(where.removeprefix("hfds/"), split, transform, **naming)
    if where.startswith("wds/"):
        from .shards import open_shards

        return open_shards(where.removeprefix("wds/"), split, transform, naming["num_classes"], naming["class_to_idx"])
    return open_images(data, split, transform=transform, same_classes=same_classes, **naming)
