"""Data sets of the Hugging Face hub, or folders of that making, as datasets of images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ...data.images import BadImage, decoded_sample
from ...data.labels import label_classes, normalize_name
from ...data.sources import VAL_NAMES
from ...runtime.optional_packages import import_optional


@dataclasses.dataclass(eq=False)
class HubImages(Dataset):
    """Samples `(image, label)`; made by `open_hub`."""

    root: str
    split: str
    table: Any = dataclasses.field(repr=False)  # datasets.Dataset with undecoded images
    image: str  # name of its column
    targets: list[int] = dataclasses.field(repr=False)
    class_to_idx: dict[str, int] = dataclasses.field(repr=False)
    num_classes: int
    transform: Callable[..., Tensor] | None = dataclasses.field(repr=False)
    on_bad: str = "raise"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        stored = self.table[index][self.image] or {}
        path = stored.get("path")

        def read() -> bytes:
            if stored.get("bytes") is None and path is None:
                raise ValueError("the data set stores no image here")
            return Path(path).read_bytes() if stored.get("bytes") is None else stored["bytes"]

        return decoded_sample(
            self, read, f"{self.root} {self.split}[{index}] {path or ''}".rstrip(), self.targets[index]
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self.class_to_idx)

    def fingerprint(self) -> str:
        """SHA-256 over the names of the files, where they have any, and the labels."""
        import pyarrow.compute

        column = self.table.with_format("arrow")[:][self.image]
        names = pyarrow.compute.struct_field(column, "path").to_pylist()
        digest = hashlib.sha256()
        for name, label in zip(names, self.targets, strict=True):
            digest.update(f"{Path(name).name if name else ''}\0{label}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {
            "root": self.root,
            "split": self.split,
            "images": len(self),
            "classes": len(self.class_to_idx),
            "num_classes": self.num_classes,
            "fingerprint": self.fingerprint(),
        }


def open_hub(
    name: str,
    split: str,
    transform: Callable[..., Tensor] | None,
    num_classes: int | None = None,
    class_to_idx: Mapping[str, int] | None = None,
    class_names: Sequence[str | None] | None = None,
) -> HubImages:
    """Open one split.

    Args:
        name: On the hub, or a folder; `NAME#COLUMN` chooses the column of labels where there are several.
        split: "train" or "val", for which validation, valid or test also stand.
        transform: From a PIL image in RGB to a tensor.
        num_classes: The outputs of the model that will see the labels; None: the classes there are.
        class_to_idx: Label of each class by name; None: as the set numbers them.
        class_names: Name of each output of the model: classes with these names get their labels.

    Raises:
        ValueError: No such set, split or column, or classes that do not fit.
        ImportError: The package datasets is missing.
    """
    datasets = import_optional("datasets", "hf", f"hfds/{name}")
    name, _, column = name.partition("#")
    root = f"hfds/{name}"
    try:
        splits = datasets.get_dataset_split_names(name)
        found = next((n for n in (VAL_NAMES if split == "val" else (split,)) if n in splits), None)
        table = datasets.load_dataset(name, split=found) if found else None
    except Exception as error:  # the hub's client and the builders each raise their own
        cause = error.__cause__ or error  # the builders wrap what happened in a DatasetGenerationError
        raise ValueError(
            f"cannot open {root} ({type(cause).__name__}: {cause}). It takes the name of a data set on the Hugging Face hub, "
            "which needs a network or a filled cache, or a folder that datasets.load_dataset reads"
        ) from error
    if table is None:
        raise ValueError(f"split={split!r} is not in {root}: it has {', '.join(splits)}")
    image = _column(table, datasets.Image, "image", "", f"split {found!r} of {root}", "images")
    label = _column(table, datasets.ClassLabel, "label", column, f"split {found!r} of {root}", "labels")
    names = [normalize_name(name) for name in table.features[label].names]
    if class_to_idx is None and num_classes in (None, len(names)) and not set(names) & set(class_names or ()):
        class_to_idx = {name: index for index, name in enumerate(names)}
    labels = label_classes(
        names,
        num_classes=num_classes,
        class_to_idx=class_to_idx,
        class_names=class_names,
        what=f"classes in split {found!r} of {root}",
    )
    given = list(table.select_columns([label])[:][label])
    if not given or not set(given) <= set(range(len(names))):
        raise ValueError(f"split {found!r} of {root} has no images, or images without a label: choose another split")
    outputs = num_classes if num_classes is not None else max(labels.values()) + 1
    targets = [labels[names[value]] for value in given]
    table = table.cast_column(image, datasets.Image(decode=False))
    return HubImages(root, found, table, image, targets, labels, outputs, transform)


def _column(table: Any, kind: type, usual: str, asked: str, where: str, what: str) -> str:
    """The name of the one column that has what is wanted."""
    there = [key for key, feature in table.features.items() if isinstance(feature, kind)]
    if asked in there:
        return asked
    if asked or not there:
        listed = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in table.features.items())
        wanted = f"column {asked!r} of {what}" if asked else f"column of {what}"
        raise ValueError(f"{where} has no {wanted}; it has {listed}")
    if usual in there or len(there) == 1:
        return usual if usual in there else there[0]
    raise ValueError(f"{where} has several columns of {what}: {', '.join(there)}. Choose one with hfds/NAME#COLUMN")
