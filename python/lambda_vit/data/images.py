"""Images in ImageNet layout, read from a folder or in place from a zip.

timm has readers for both, but its dataset replaces an undecodable image by the next one and numbers whichever class
folders it finds. Either can silently falsify an accuracy. Here every unreadable image is named, and the class indices are
those of the train split or of ImageNet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from .decoding import decode_image
from .fingerprints import describe_dataset
from .labels import label_classes, normalize_name
from .sources import SPLIT_NAMES, Folder, Zip, extensions, find_split, open_source

# A map-style dataset with a length, which PyTorch's class does not promise.
SizedDataset = Any


class CorruptImageError(ValueError):
    """One or more images could not be read or decoded; the message names them and the remedy."""


class BadImage(NamedTuple):
    """A placeholder in a batch for an unreadable image, until the loader counts it."""

    path: str
    reason: str


@dataclasses.dataclass(eq=False)
class ImageDataset(Dataset[Any]):
    """Samples `(image, label)`; made by `open_images`."""

    source: Folder | Zip = dataclasses.field(repr=False)
    at: str  # the split's folder inside the source
    split: str  # as asked for, or "all" where there are no split folders
    samples: list[tuple[str, int]] = dataclasses.field(repr=False)  # (path inside the source, label)
    class_to_idx: dict[str, int] = dataclasses.field(repr=False)  # not 0…n-1 where ten classes are scored 1000-way
    num_classes: int  # the outputs that the labels are meant for
    transform: Callable[..., Tensor] | None = dataclasses.field(repr=False)
    on_bad: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        path, label = self.samples[index]
        return decoded_sample(self, lambda: self.source.read(path), self.source.show(path), label)

    @property
    def root(self) -> Path:
        return self.source.root

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, sorted."""
        return sorted(self.class_to_idx)

    @property
    def targets(self) -> list[int]:
        """The label of every sample, without reading any image."""
        return [label for _, label in self.samples]

    def select(self, indices: Iterable[int]) -> ImageDataset:
        """The same dataset with these samples only, in this order."""
        return dataclasses.replace(self, samples=[self.samples[i] for i in indices])

    def fingerprint(self) -> str:
        """SHA-256 of the sorted paths below the split folder and the sizes in bytes: equal for a folder and its zip."""
        digest = hashlib.sha256()
        for path in sorted(path for path, _ in self.samples):
            digest.update(f"{path.removeprefix(self.at).lstrip('/')}\0{self.source.size(path)}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The description of the data for a report."""
        return describe_dataset(self, str(self.root))


def decoded_sample(dataset: Any, read: Callable[[], bytes], path: str, label: int) -> tuple[Tensor, int] | BadImage:
    """Decode one sample of a dataset that has `transform` and `on_bad`."""
    from torchvision.transforms.functional import to_tensor

    try:
        image = decode_image(read())
    except Exception as error:  # PIL and zipfile raise almost any exception for damaged bytes
        # PIL's message for a file of another kind names a memory buffer.
        unknown = type(error).__name__ == "UnidentifiedImageError"
        bad = BadImage(path, "not an image" if unknown else f"{error}" or type(error).__name__)
        if dataset.on_bad == "mark":
            return bad
        raise CorruptImageError(corrupt_message([bad], 0)) from error
    return (dataset.transform or to_tensor)(image), label


def open_images(
    root: str | os.PathLike[str],
    split: str,
    *,
    transform: Callable[..., Tensor] | None = None,
    num_classes: int | None = None,
    class_to_idx: Mapping[str, int] | None = None,
    class_names: Sequence[str | None] | None = None,
    same_classes: bool = True,
    on_bad: str = "raise",
) -> ImageDataset:
    """Open one split of an image set laid out as `<split>/<class>/<image>`, in a folder or in a zip.

    A single top folder around the splits is skipped. If the root has class folders instead of split folders, it serves as
    any split, and the dataset's `split` is "all".

    Args:
        root: A folder, or a zip that is read in place.
        split: "train" or "val", for which a single other folder of `sources.TRAIN_NAMES` or `VAL_NAMES` is used if there
            is none of that name. All these names are accepted too, and capitals do not matter.
        transform: Maps a PIL image in RGB to a tensor; see `transforms_for`. Default: float [3, H, W] in 0…1.
        num_classes: Number of outputs of the model. With 1000 outputs and ImageNet synsets as folder names, the labels are
            ImageNet's, however few folders there are; otherwise it must be the number of folders, which are labelled
            0…n-1 in timm's order: natural ("2" before "10") and regardless of case. None: the number of folders.
        class_to_idx: The label of each class folder, instead of the rule above; it may have further classes.
        class_names: Name of each output, as `models.properties.get_class_names` gives them: folders with these names
            get their labels, instead of the rule above.
        same_classes: Require the classes of the train split, if there is one, unless `class_to_idx` has them.
        on_bad: The effect of indexing an unreadable image: "raise" raises `CorruptImageError`, "mark" returns a `BadImage`.
            `make_loader` counts unreadable images with either.

    Raises:
        ValueError: The root, the split or images do not exist; class folders are missing, empty, or not in the train split
            (or in `class_to_idx`); or the number of classes does not match `num_classes`.

    Warns:
        UserWarning: See `labels.label_classes`.
    """
    split = split.lower()
    if split not in SPLIT_NAMES:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLIT_NAMES)}")
    if on_bad not in ("raise", "mark"):
        raise ValueError(f"on_bad={on_bad!r}: expected 'raise' or 'mark'")
    source = open_source(Path(root))
    name, at, train_at = find_split(source, split)
    images: dict[str, list[str]] = {}
    for folder, paths in source.images(at).items():
        images.setdefault(normalize_name(folder), []).extend(paths)
    where = source.show(at) if at else str(source.root)
    if not any(images.values()):
        raise ValueError(
            f"no images in {where} (split {name!r}): expected <class>/<image> there, "
            f"with the extensions {' '.join(extensions())}"
        )
    if class_to_idx is not None or train_at in (None, at) or not same_classes:
        _check_classes(images, set(images), where, "the folder itself")
    else:
        _check_classes(images, set(map(normalize_name, source.folders(train_at))), where, "the train split")
    indices = label_classes(sorted(images), num_classes=num_classes, class_to_idx=class_to_idx, class_names=class_names)
    outputs = max(indices.values()) + 1 if num_classes is None else num_classes
    samples = [(path, indices[folder]) for folder, paths in images.items() for path in paths]
    return ImageDataset(source, at, name, samples, indices, outputs, transform, on_bad)


def corrupt_message(bad: list[BadImage], allowed: int) -> str:
    """The message of a `CorruptImageError`."""
    listed = "; ".join(f"{b.path} ({b.reason})" for b in bad[:10]) + ("; …" if len(bad) > 10 else "")
    return (
        f"cannot read {len(bad)} image{'s' * (len(bad) > 1)}, with {allowed} allowed: {listed}. "
        "Replace or delete them, or leave out up to N unreadable images with --skip-bad N (skip_bad=N in Python)"
    )


def _check_classes(images: Mapping[str, list[str]], expected: set[str], where: str, standard: str) -> None:
    problems = {
        "missing": sorted(expected - set(images)),
        "extra": sorted(set(images) - expected),
        "empty": sorted(name for name, paths in images.items() if not paths),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind} ({len(names)}): {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(
            f"the class folders in {where} must be those of {standard}, each with images: {listed}. Complete or remove "
            "them, or pass class_to_idx with the classes that are there: labels would not mean the same"
        )
