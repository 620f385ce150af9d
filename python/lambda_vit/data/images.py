"""Images in ImageNet layout, read from a folder or in place from a zip, and the digits that ship inside scikit-learn.

timm has readers for both, but its dataset replaces an image it cannot decode by the next one, and it numbers the class
folders it happens to find: either way an accuracy can be wrong without a word. Here every unreadable image is named,
and the class indices are those of the train split or of ImageNet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .evaluate import input_shape
from .image_sources import SPLIT_NAMES, Folder, Zip, extensions, find_split, open_source
from .worker_signals import held_back, started

# A map-style dataset. PyTorch's class promises no length; samples are drawn by it.
SizedDataset = Any


class CorruptImageError(ValueError):
    """One or more images could not be read or decoded; the message names them and the remedy."""


class BadImage(NamedTuple):
    """What stands in a batch where an image could not be read, until the loader counts it."""

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
        """SHA-256 over the sorted paths (below the split folder) and sizes in bytes: equal for a folder and its zip."""
        digest = hashlib.sha256()
        for path in sorted(path for path, _ in self.samples):
            digest.update(f"{path.removeprefix(self.at).lstrip('/')}\0{self.source.size(path)}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return _describe(self, str(self.root))


def decoded_sample(dataset: Any, read: Callable[[], bytes], path: str, label: int) -> tuple[Tensor, int] | BadImage:
    """One sample of a dataset with a `transform` and an `on_bad`, from the bytes of a file."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    try:
        with Image.open(io.BytesIO(read())) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # PIL and zipfile raise almost anything over damaged bytes
        # PIL's own text for a file of another kind names a buffer in memory.
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
    on_bad: str = "raise",
) -> ImageDataset:
    """Open one split of an image set laid out as `<split>/<class>/<image>`, in a folder or in a zip.

    One common top folder is looked through. A root without split folders, whose children are class folders, serves for
    any split, and the dataset's `split` is then "all".

    Args:
        root: A folder, or a zip that is read in place.
        split: "train" or "val". Where there is no `val`, a lone `validation`, `valid` or `test` stands for it; each of
            these can also be asked for by name.
        transform: From a PIL image in RGB to a tensor; see `transforms_for`. Default: float [3, H, W] in 0…1.
        num_classes: The outputs of the model that will see the labels. With 1000 and ImageNet synsets as folder names
            the labels are ImageNet's own, however few the folders; otherwise it must be the number of folders, labelled
            0…n-1 in sorted order. None: the number there is.
        class_to_idx: The labels, instead of the rule above.
        on_bad: What indexing does with an unreadable image: "raise" a `CorruptImageError`, or "mark" it by returning a
            `BadImage`. `make_loader` counts them by itself, whichever is set.

    Raises:
        ValueError: No such root, split or images; class folders that are missing, empty, or not in the train split (or
            in `class_to_idx`); a number of classes that does not fit `num_classes`.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLIT_NAMES)}")
    if on_bad not in ("raise", "mark"):
        raise ValueError(f"on_bad={on_bad!r}: expected 'raise' or 'mark'")
    source = open_source(Path(root))
    name, at, train_at = find_split(source, split)
    images = source.images(at)
    where = source.show(at) if at else str(source.root)
    if not any(images.values()):
        raise ValueError(
            f"no images in {where} (split {name!r}): expected <class>/<image> there, "
            f"with the extensions {' '.join(extensions())}"
        )
    if class_to_idx is not None:
        _check_classes(images, set(class_to_idx), where, "class_to_idx")
    elif train_at in (None, at):
        _check_classes(images, set(images), where, "the folder itself")
    else:
        _check_classes(images, set(source.folders(train_at)), where, "the train split")
    indices = _labels(sorted(images), num_classes) if class_to_idx is None else dict(class_to_idx)
    outputs = max(indices.values()) + 1 if num_classes is None else num_classes
    outside = {k: v for k, v in indices.items() if not 0 <= v < outputs}
    if outside:
        raise ValueError(f"class_to_idx has labels outside 0…{outputs - 1} for num_classes={outputs}: {outside}")
    samples = [(path, indices[folder]) for folder, paths in images.items() for path in paths]
    return ImageDataset(source, at, name, samples, indices, outputs, transform, on_bad)


@dataclasses.dataclass(eq=False)
class ImageLoader:
    """Batches `(images [N, ...], targets [N])`; made by `make_loader`. Can be iterated any number of times."""

    dataset: SizedDataset
    batch_size: int
    workers: int
    shuffle: bool
    seed: int
    skip_bad: int
    drop_last: bool
    pin_memory: bool
    shard: tuple[int, int] = (0, 1)
    worker_init: Callable[[int], None] | None = dataclasses.field(default=None, repr=False)
    epoch: int = 0
    _found: dict[str, BadImage] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return len(range(self.shard[0], whole + bool(rest and not self.drop_last), self.shard[1]))

    @property
    def bad(self) -> list[str]:
        """Paths of the unreadable images met so far, each once. A batch that had one is that much shorter."""
        return list(self._found)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass: the same seed and epoch give the same order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))
        starts = range(0, len(order) - (self.batch_size - 1 if self.drop_last else 0), self.batch_size)
        # Whole batches are shared out, so that each is the same whatever the number of processes.
        own = [order[start : start + self.batch_size].tolist() for start in starts][self.shard[0] :: self.shard[1]]
        # A worker that raised would bury the path in its own traceback, so unreadable images travel as marks.
        marking = hasattr(self.dataset, "on_bad")
        batches = DataLoader(
            dataclasses.replace(self.dataset, on_bad="mark") if marking else self.dataset,
            batch_sampler=own,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            # Of its own: workers are seeded by (seed, epoch), and the caller's random state is left alone.
            generator=torch.Generator().manual_seed(int(rng.integers(2**32))),
            worker_init_fn=None if self.worker_init is None else functools.partial(started, self.worker_init),
        )
        with contextlib.nullcontext() if self.worker_init is None else held_back():
            answers = iter(batches)
        for images, targets, bad in answers:
            self._found.update((b.path, b) for b in bad)
            if len(self._found) > self.skip_bad:
                raise CorruptImageError(corrupt_message(list(self._found.values()), self.skip_bad))
            if len(targets):
                yield images, targets


def make_loader(
    dataset: SizedDataset,
    batch_size: int,
    *,
    workers: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    skip_bad: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
    shard: tuple[int, int] = (0, 1),
    worker_init: Callable[[int], None] | None = None,
) -> ImageLoader:
    """Batches of a dataset, in its own order or shuffled by `(seed, epoch)`.

    Args:
        dataset: An `ImageDataset`, `digits(...)`, or any map-style dataset of `(tensor, label)`.
        batch_size: Images per batch.
        workers: Processes that read and decode; 0 does it in this one.
        shuffle: A new order per epoch; call `set_epoch` before each pass.
        seed: Of the order and of the workers' random transforms.
        skip_bad: How many different unreadable images to leave out before giving up.
        drop_last: Leave out the last batch where it is shorter.
        pin_memory: Page-locked batches, where a CUDA device is there to use them.
        shard: (rank, size): of several processes that share the batches, the one with this rank gets every size-th.
        worker_init: Called in each worker with its number, before it reads.

    Raises:
        ValueError: An empty dataset, or an argument out of range.
        CorruptImageError: While iterating, at the first image beyond `skip_bad` that cannot be read.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("skip_bad", skip_bad, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
    if len(dataset) == 0:
        where = f"split {dataset.split!r} of {dataset.root}" if isinstance(dataset, ImageDataset) else repr(dataset)
        raise ValueError(f"the dataset is empty ({where}): nothing to iterate over")
    if drop_last and len(dataset) < batch_size:
        raise ValueError(f"batch_size={batch_size} with drop_last leaves nothing of {len(dataset)} images: lower it")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard!r}: expected (rank, size) with 0 <= rank < size")
    return ImageLoader(dataset, batch_size, workers, shuffle, seed, skip_bad, drop_last, pin_memory, shard, worker_init)


def subset(dataset: Any, samples: int, *, seed: int | None = None) -> Any:
    """A class-balanced part of a dataset, the classes taking turns in its order.

    Args:
        dataset: An `ImageDataset` or `digits(...)`: anything with `targets` and `select(indices)`.
        samples: How many. With fewer than classes, classes are spread evenly; a class that runs out leaves its share to
            the others; more than there are gives all of them, and a warning.
        seed: None takes evenly spaced images of each class, an integer random ones.

    Raises:
        ValueError: `samples` below 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}: expected an integer of at least 1")
    if samples > len(dataset):
        warnings.warn(f"samples={samples} is more than the {len(dataset)} there are: using all", stacklevel=2)
    rng = None if seed is None else np.random.default_rng(seed)
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(dataset.targets):
        groups.setdefault(label, []).append(index)
    members = [groups[label] for label in sorted(groups)]
    turns = [
        (turn, position, group[pick])
        for position, (group, share) in enumerate(zip(members, _shares(members, samples, rng), strict=True))
        for turn, pick in enumerate(_spread(len(group), share, rng))
    ]
    return dataset.select([index for _, _, index in sorted(turns)])


def transforms_for(model: nn.Module, training: bool = False, **augment: Any) -> Callable[..., Tensor]:
    """timm's transform for a model: its mean, std, interpolation and crop, at the size the model was built for.

    Args:
        model: A timm model with 1 or 3 input channels; with 1, images are turned to grey.
        training: Random crops and flips, and whatever `augment` adds.
        **augment: Further arguments of `timm.data.create_transform`, such as `auto_augment` or `re_prob`.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Grayscale

    config = data_config(model)
    size = config["input_size"]
    transform = create_transform(**{**config, "is_training": training, **augment})
    return Compose([Grayscale(), transform]) if size[0] == 1 else transform


def data_config(model: nn.Module) -> dict[str, Any]:
    """What timm says of how images are prepared for a model: input_size, mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        ValueError: The model takes neither grey nor colour images.
    """
    from timm.data import resolve_model_data_config

    size = input_shape(model)
    if size[0] not in (1, 3):
        raise ValueError(f"the model takes {size[0]} channels, images have 1 or 3: pass a transform of your own")
    config = resolve_model_data_config(model, args={"input_size": size})
    if size[0] == 1:
        config |= {key: (float(np.mean(config[key])),) for key in ("mean", "std")}
    return config


class Digits(TensorDataset):
    """Handwritten digits as `tensors = (images [N, 1, H, W], labels [N])`; made by `digits`."""

    def __init__(self, images: Tensor, labels: Tensor, split: str) -> None:
        super().__init__(images, labels)
        self.split = split
        self.classes = [str(digit) for digit in range(10)]
        self.num_classes = 10

    @property
    def targets(self) -> list[int]:
        return self.tensors[1].tolist()

    def select(self, indices: Iterable[int]) -> Digits:
        keep = torch.tensor(list(indices), dtype=torch.long)
        return Digits(self.tensors[0][keep], self.tensors[1][keep], self.split)

    def fingerprint(self) -> str:
        """SHA-256 over the images and labels."""
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in self.tensors)).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return _describe(self, "scikit-learn digits")


def digits(split: str, image_size: int | None = None) -> Digits:
    """The 1,797 digits that ship inside scikit-learn: no download, one fixed stratified split.

    Args:
        split: "train" (1,437 images) or "val" (360).
        image_size: Resize to this many pixels a side; None keeps 8.

    Returns:
        Float images [N, 1, S, S] with the train split at mean 0 and std 1.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: the digits have 'train' and 'val'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: expected at least 1 pixel")
    pixels, labels = load_digits(return_X_y=True)
    train, val = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    if image_size is not None:
        images = nn.functional.interpolate(images, size=(image_size, image_size), mode="bicubic", antialias=True)
    images = (images - images[train].mean()) / images[train].std()
    chosen = train if split == "train" else val
    return Digits(images[chosen], torch.from_numpy(labels).long()[chosen], split)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[BadImage]]:
    good = [item for item in items if not isinstance(item, BadImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    targets = torch.tensor([int(label) for _, label in good], dtype=torch.long)
    return images, targets, [item for item in items if isinstance(item, BadImage)]


def _describe(dataset: ImageDataset | Digits, root: str) -> dict[str, Any]:
    return {
        "root": root,
        "split": dataset.split,
        "images": len(dataset),
        "classes": len(dataset.classes),
        "num_classes": dataset.num_classes,
        "fingerprint": dataset.fingerprint(),
    }


def corrupt_message(bad: list[BadImage], allowed: int) -> str:
    """What a `CorruptImageError` says."""
    listed = "; ".join(f"{b.path} ({b.reason})" for b in bad[:10]) + ("; …" if len(bad) > 10 else "")
    return (
        f"cannot read {len(bad)} image{'s' * (len(bad) > 1)}, with {allowed} allowed: {listed}. "
        "Replace or delete them, or leave out up to N unreadable images with --skip-bad N (skip_bad=N in Python)"
    )


def _shares(members: list[list[int]], samples: int, rng: np.random.Generator | None) -> list[int]:
    """How many samples each class gives: as equal as their sizes allow."""
    shares = [0] * len(members)
    left = min(samples, sum(map(len, members)))
    while left:
        open_ = [i for i, group in enumerate(members) if shares[i] < len(group)]
        # At least one turn for everybody, at most what is left; fewer turns than classes go to classes spread evenly.
        for i in open_ if left >= len(open_) else [open_[j] for j in _spread(len(open_), left, rng)]:
            shares[i] += 1
            left -= 1
    return shares


def _spread(count: int, wanted: int, rng: np.random.Generator | None) -> list[int]:
    """`wanted` different positions out of `count`, evenly spaced or random."""
    if rng is not None:
        return rng.permutation(count)[:wanted].tolist()
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


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
            "them, or pass class_to_idx with exactly the classes that are there: labels would not mean the same"
        )


def _labels(names: list[str], num_classes: int | None) -> dict[str, int]:
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        synsets = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
        if all(name in synsets for name in names):
            return {name: synsets[name] for name in names}
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"there are {len(names)} class folders ({', '.join(names[:3])}, …) and num_classes={num_classes}: use a "
            f"model with {len(names)} outputs, or say which output each folder belongs to (--class-map FILE on the command "
            "line, class_to_idx in Python)"
        )
    return {name: index for index, name in enumerate(names)}
