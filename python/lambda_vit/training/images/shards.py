"""WebDataset shards: tar files that are read from front to back, with the files of a sample one after the other.

Every micro-batch number has shards of its own in an epoch, in an order and through a shuffle buffer that follow from
(seed, epoch, number); so here too neither processes nor workers change what a micro-batch holds. A place in the middle is
reached by reading past all that comes before it, without decoding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...data.images import BadImage, CorruptImageError, corrupt_message, decoded_sample
from ...data.sources import VAL_NAMES, extensions, is_visible
from ...runtime.optional_packages import import_optional
from ...runtime.progress import track
from ...runtime.seeding import mixed_seed
from ...runtime.signals import block_signals, init_worker, spare_worker
from ..recipe import Recipe
from .stream import Answer, MicroBatch, TrainingStream, as_it_is, read_micro_batch

BUFFER = 1024  # undecoded samples among which the next one is drawn
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # of shards; webdataset reads them alike
_UNREADABLE = (OSError, EOFError, tarfile.TarError, zlib.error)


@dataclasses.dataclass(eq=False)
class Shards:
    """One split; made by `open_shards`."""

    root: str
    split: str
    lengths: dict[str, int] = dataclasses.field(repr=False)  # samples of each shard, by its address
    transform: Callable[..., Tensor] | None = dataclasses.field(repr=False)
    num_classes: int | None
    info: str | None = dataclasses.field(default=None, repr=False)  # the file that gave the lengths; None: counted
    on_bad: str = "mark"

    def __len__(self) -> int:
        return sum(self.lengths.values())

    def stream(self, recipe: Recipe, **options: Any) -> ShardStream:
        """For training; options as of `DatasetStream`."""
        return ShardStream(self, recipe, **options)

    def loader(self, batch_size: int, **options: Any) -> ShardLoader:
        """For validation; options as of `make_loader`."""
        return ShardLoader(self, batch_size, **options)

    def samples(self, url: str) -> Iterator[tuple[str, bytes, int]]:
        """(path, image file, label) of every sample of a shard.

        Raises:
            ValueError: The shard cannot be read, holds another number of samples than is written down, or a sample has
                no image or no label that the model knows.
        """
        import_optional("webdataset", "wds", self.root)
        from webdataset.tariterators import tar_file_expander, url_opener

        count = 0
        for sample in _samples(url, tar_file_expander(url_opener(iter([{"url": url}])), select_files=_belongs)):
            count += 1
            yield self._parts(url, sample)
        if count != self.lengths[url]:
            remedy = "it changed since it was counted" if self.info is None else f"replace it, or correct {self.info}"
            raise ValueError(f"the shard {url} holds {count} samples, not {self.lengths[url]}: {remedy}")

    def _parts(self, url: str, sample: dict[str, Any]) -> tuple[str, bytes, int]:
        path = f"{url}!{sample['__key__']}"
        try:
            label = int(sample["cls"])
        except ValueError:
            label = -1
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            raise ValueError(
                f"the sample {path} has the label {sample['cls'][:20]!r}: expected a number from 0 to "
                f"{'…' if self.num_classes is None else self.num_classes - 1}, an output of the model"
            )
        return path, next(sample[suffix] for suffix in _image_suffixes() if suffix in sample), label

    def load(self, sample: tuple[str, bytes, int]) -> tuple[Tensor, int] | BadImage:
        """Decode and transform."""
        path, content, label = sample
        return decoded_sample(self, lambda: content, path, label)

    def fingerprint(self) -> str:
        """SHA-256 over the names of the shards and their lengths."""
        named = sorted(f"{os.path.basename(url)}\0{length}\n" for url, length in self.lengths.items())
        return hashlib.sha256("".join(named).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {
            "root": self.root,
            "split": self.split,
            "images": len(self),
            "shards": len(self.lengths),
            "num_classes": self.num_classes,
            "fingerprint": self.fingerprint(),
        }


def open_shards(
    root: str,
    split: str,
    transform: Callable[..., Tensor] | None,
    num_classes: int | None = None,
    class_to_idx: Mapping[str, int] | None = None,
) -> Shards:
    """Open one split.

    Args:
        root: A folder or an address with an `info.json` or `_info.json` as timm reads it, or a folder without one, whose
            shards have the name of the split in theirs (`…train…​.tar`); those are counted once.
        split: "train" or "val", for which validation, valid or test also stand.
        transform: From a PIL image in RGB to a tensor.
        num_classes: Labels are below it.
        class_to_idx: Must be None: the labels of shards are numbers already.

    Raises:
        ValueError: No such folder or split, or a class map is given.
        ImportError: The package webdataset is missing.
    """
    import_optional("webdataset", "wds", f"wds/{root}")
    if class_to_idx is not None:
        raise ValueError(f"wds/{root}: the labels of shards are numbers already; leave out the class map")
    names = VAL_NAMES if split == "val" else (split,)
    path, info = _info(root)
    if info is None:
        found, lengths = _counted(Path(root), names)
    else:
        try:
            splits = info["splits"]
            found = next((name for name in names if name in splits), None)
            files, counts = (splits[found][key] for key in ("filenames", "shard_lengths")) if found else ((), ())
            lengths = {os.path.join(root, file): int(count) for file, count in zip(files, counts, strict=True)}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks {error}; see timm's ReaderWds for the form") from error
        except ValueError as error:
            raise ValueError(f"{path} does not give every shard of split {found!r} a length: {error}") from error
        if found is None:
            raise ValueError(f"split={split!r} is not in wds/{root}: it has {', '.join(splits)}")
    if sum(lengths.values()) == 0:
        raise ValueError(
            f"split {found!r} of wds/{root} has no samples: expected an image and a label (.cls) of the same name"
        )
    return Shards(f"wds/{root}", found, lengths, transform, num_classes, path)


def _info(root: str) -> tuple[str | None, dict[str, Any] | None]:
    """The path and the content of the info file; (None, None) of a folder without one."""
    import webdataset

    for name in ("_info.json", "info.json"):
        path = os.path.join(root, name)
        if os.path.isdir(root) and not os.path.isfile(path):
            continue
        try:
            with webdataset.gopen(path) as file:
                return path, json.load(file)
        except (OSError, ValueError) as error:
            failed = f"wds/{root}: cannot read {name} ({type(error).__name__}: {error})"
            if os.path.isdir(root):
                raise ValueError(f"{failed}. Correct or remove it; without one, the shards are counted") from error
    if os.path.isdir(root):
        return None, None
    raise ValueError(f"{failed}. Without one, shards must lie in a folder, where they can be counted")


def _counted(folder: Path, names: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    shards = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and is_visible(path.name))
    for name in names:
        of_split = [path for path in shards if name in path.name]
        if of_split:
            return name, {str(path): _count(path) for path in track(of_split, f"Count {name} shards")}
    listed = ", ".join(path.name for path in shards[:5]) or f"no files that end in {' '.join(SUFFIXES)}"
    raise ValueError(
        f"wds/{folder} has no info.json, and no shards with {' or '.join(names)} in their names: it has {listed}"
    )


def _count(path: Path) -> int:
    try:
        with tarfile.open(path) as archive:
            files = ({"fname": m.name, "data": b"", "__url__": ""} for m in archive if m.isreg() and _belongs(m.name))
            return sum(1 for _ in _samples(str(path), files))
    except _UNREADABLE as error:
        raise _unreadable(str(path), error) from error


def _samples(url: str, files: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Group the files of a shard as webdataset does; leave out groups without any image or label, such as a README's.

    Raises:
        ValueError: The shard cannot be read, or a sample lacks its image or its label.
    """
    images = _image_suffixes()
    for sample in _grouped(url, files):
        suffixes = [key for key in sample if not key.startswith("__")]
        if not any(suffix.rpartition(".")[2] in (*images, "cls") for suffix in suffixes):
            continue
        if "cls" not in sample or not any(suffix in sample for suffix in images):
            remedy = "Write the label as a number to a .cls file; tar --sort=name puts the files of a sample together"
            if any("." in suffix for suffix in suffixes):
                remedy = "What follows the first point of a name is its suffix: rename files with further points"
            raise ValueError(
                f"the sample {url}!{sample['__key__']} must have an image (.{' .'.join(images)}) and a label (.cls), one after "
                f"the other; it has {', '.join(suffixes)}. {remedy}"
            )
        yield sample


def _grouped(url: str, files: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys

    try:
        yield from group_by_keys(files)
    except _UNREADABLE as error:
        raise _unreadable(url, error) from error
    except ValueError as error:  # webdataset's, of two files with one name
        raise ValueError(f"cannot read the shard {url} ({error.args[0]}). Rename one of these files") from error


def _unreadable(url: str, error: BaseException) -> ValueError:
    return ValueError(f"cannot read the shard {url} ({type(error).__name__}: {error}). Replace it")


def _belongs(name: str) -> bool:
    """Whether a member of a shard may be part of a sample: it is neither hidden nor webdataset's metadata."""
    return is_visible(name) and re.match(r"__[^/]*__($|/)", name) is None


def _image_suffixes() -> tuple[str, ...]:
    """In the order in which timm's reader looks for the image of a sample; then timm's other suffixes."""
    return tuple(dict.fromkeys(("jpg", "png", "webp", *(suffix[1:] for suffix in extensions()))))


@dataclasses.dataclass
class _Pass(IterableDataset):
    """An epoch of one process, from a step on; each worker makes every so many-th of its micro-batches."""

    shards: Shards
    seed: int
    epoch: int
    steps: range
    numbers: range
    parts: int  # micro-batches of a step, over all processes
    size: int  # images of a micro-batch

    def __iter__(self) -> Iterator[Answer]:
        worker, workers = _worker()
        wanted = [(step, number) for step in self.steps for number in self.numbers][worker::workers]
        sources: dict[int, Iterator[tuple[str, bytes, int]]] = {}
        taken: dict[int, int] = {}
        for step, number in wanted:
            source = sources.setdefault(number, self._samples(number))
            for _ in range((step - taken.get(number, 0)) * self.size):
                next(source)
            taken[number] = step + 1
            samples = [next(source) for _ in range(self.size)]
            first = (step * self.parts + number) * self.size
            yield read_micro_batch(samples, self.shards.load, self.seed, self.epoch, first)

    def _samples(self, number: int) -> Iterator[tuple[str, bytes, int]]:
        """Without end: where the shards of a number hold less than its share of an epoch, they are read again."""
        urls = sorted(self.shards.lengths)
        random.Random(mixed_seed("shards", self.seed, self.epoch)).shuffle(urls)
        rng = random.Random(mixed_seed("buffer", self.seed, self.epoch, number))
        buffer: list[tuple[str, bytes, int]] = []
        while True:
            for url in urls[number :: self.parts]:
                for sample in self.shards.samples(url):
                    buffer.append(sample)
                    if len(buffer) >= BUFFER:
                        yield _drawn(buffer, rng)
            while buffer:
                yield _drawn(buffer, rng)


class ShardStream(TrainingStream):
    """Shards as a training stream; arguments as of `DatasetStream`.

    In every epoch the shards are dealt out anew to the micro-batch numbers. A number whose shards hold more than its part
    of the epoch leaves some samples out this time; one whose shards hold less reads them again.

    Raises:
        ValueError: As `TrainingStream`; fewer shards than micro-batches in a step; repeated augmentation.
    """

    def __init__(
        self,
        shards: Shards,
        recipe: Recipe,
        *,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        skip_bad: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        what = f"split {shards.split!r} of {shards.root}"
        super().__init__(len(shards), recipe, shard=shard, skip_bad=skip_bad, what=what)
        filled = [url for url, length in shards.lengths.items() if length]
        if len(filled) < self.micro_batches:
            raise ValueError(
                f"{what} has {len(filled)} shards and a step {self.micro_batches} micro-batches, of which each reads shards of "
                "its own: use a larger micro_batch, or more shards"
            )
        if recipe.repeated_aug:
            raise ValueError(f"repeated_aug={recipe.repeated_aug}: shards give one view of every image; set it to 0")
        self.dataset = dataclasses.replace(shards, lengths={url: shards.lengths[url] for url in filled})
        self.workers = workers
        self._options = _loading(workers, prefetch, pin_memory)

    def _steps(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        steps = range(start, self.steps_per_epoch)
        parts = self.micro_batches, self.micro_batch_size
        loader = DataLoader(_Pass(self.dataset, self.seed, epoch, steps, self.numbers, *parts), **self._options)
        with block_signals():
            answers = iter(loader)
        del loader  # nothing but the answers keeps the workers
        for step in steps:
            yield [self._checked(next(answers), step, number) for number in self.numbers]

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint()

    def describe(self) -> dict[str, Any]:
        note = "read from front to back: going on in mid-epoch reads past what was used"
        return {
            **self.dataset.describe(),
            **self._sizes(),
            "images_per_epoch": self.images_per_epoch,
            "workers": self.workers,
            "order": note,
        }


@dataclasses.dataclass
class _ValPass(IterableDataset):
    shards: Shards
    batch_size: int
    shard: tuple[int, int]

    def __iter__(self) -> Iterator[Answer]:
        worker, workers = _worker()
        part, parts = self.shard[0] * workers + worker, self.shard[1] * workers
        urls = sorted(self.shards.lengths)
        apart = len(urls) >= parts  # else all read everything, and decode their share
        batch: list[tuple[str, bytes, int]] = []
        number = 0
        for url in urls[part::parts] if apart else urls:
            for sample in self.shards.samples(url):
                batch.append(sample)
                if len(batch) == self.batch_size:
                    if apart or number % parts == part:
                        yield self._read(batch)
                    batch, number = [], number + 1
        if batch and (apart or number % parts == part):
            yield self._read(batch)

    def _read(self, batch: list[tuple[str, bytes, int]]) -> Answer:
        items = [self.shards.load(sample) for sample in batch]
        good = [item for item in items if not isinstance(item, BadImage)]
        images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
        labels = torch.tensor([label for _, label in good], dtype=torch.long)
        return Answer(images, labels, [item for item in items if isinstance(item, BadImage)])


class ShardLoader:
    """Batches `(images [N, ...], targets [N])` of a process's share of the shards, each image once; as `ImageLoader`."""

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        workers: int = 0,
        skip_bad: int = 0,
        pin_memory: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset = shards
        self.batch_size = batch_size
        self.workers = workers
        self.skip_bad = skip_bad
        self._loader = DataLoader(_ValPass(shards, batch_size, shard), **_loading(workers, 2, pin_memory))
        self._found: dict[str, BadImage] = {}

    @property
    def bad(self) -> list[str]:
        """Paths of the unreadable images met so far, each once. A batch that had one is that much shorter."""
        return list(self._found)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with block_signals():
            answers = iter(self._loader)
        for images, targets, bad in answers:
            self._found.update((image.path, BadImage(*image)) for image in bad)
            if len(self._found) > self.skip_bad:
                raise CorruptImageError(corrupt_message(list(self._found.values()), self.skip_bad))
            if len(targets):
                yield images, targets


def _worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _loading(workers: int, prefetch: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "batch_size": None,  # what is iterated over makes whole batches
        "num_workers": workers,
        "prefetch_factor": prefetch if workers else None,
        "collate_fn": as_it_is,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "generator": torch.Generator(),  # of its own: the caller's is left alone
        "worker_init_fn": partial(init_worker, spare_worker),
    }


def _drawn(buffer: list[Any], rng: random.Random) -> Any:
    place = rng.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
