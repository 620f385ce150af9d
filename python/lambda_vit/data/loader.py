"""The loader of images: batches, subsets, and shards for several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lambda_kernels.ops.checks import require_int

from ..runtime.signals import block_signals, init_worker
from .images import BadImage, CorruptImageError, ImageDataset, SizedDataset, corrupt_message


@dataclasses.dataclass(eq=False)
class ImageLoader:
    """Batches `(images [N, ...], targets [N])`; made by `make_loader`. It can be iterated repeatedly."""

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
        """Paths of the unreadable images so far, each once. Their batches are shorter."""
        return list(self._found)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which together with the seed determines the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))
        starts = range(0, len(order) - (self.batch_size - 1 if self.drop_last else 0), self.batch_size)
        # Processes share whole batches, so that each batch is the same for any number of processes.
        own = [order[start : start + self.batch_size].tolist() for start in starts][self.shard[0] :: self.shard[1]]
        # An exception in a worker would bury the path in its traceback, so that workers return marks for unreadable images.
        marking = hasattr(self.dataset, "on_bad")
        batches = DataLoader(
            dataclasses.replace(self.dataset, on_bad="mark") if marking else self.dataset,
            batch_sampler=own,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            # Workers are seeded by (seed, epoch), and the caller's random state stays unchanged.
            generator=torch.Generator().manual_seed(int(rng.integers(2**32))),
            worker_init_fn=None if self.worker_init is None else functools.partial(init_worker, self.worker_init),
        )
        with contextlib.nullcontext() if self.worker_init is None else block_signals():
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
        workers: Processes that read and decode; with 0, this process does it.
        shuffle: Use a new order in each epoch; call `set_epoch` before each pass.
        seed: Seed of the order and of the workers' random transforms.
        skip_bad: Number of different unreadable images that are omitted before an error is raised.
        drop_last: Omit the last batch if it is shorter.
        pin_memory: Page-lock batches if there is a CUDA device.
        shard: (rank, size): of several processes that share the batches, the process of this rank gets every size-th.
        worker_init: Called in each worker with its number, before it reads.

    Raises:
        ValueError: The dataset is empty, or an argument is out of range.
        CorruptImageError: While iterating, at the first unreadable image beyond `skip_bad`.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("skip_bad", skip_bad, 0)):
        require_int(name, value, least, strict=True)
    if len(dataset) == 0:
        where = f"split {dataset.split!r} of {dataset.root}" if isinstance(dataset, ImageDataset) else repr(dataset)
        raise ValueError(f"the dataset is empty ({where}): nothing to iterate over")
    if drop_last and len(dataset) < batch_size:
        raise ValueError(f"batch_size={batch_size} with drop_last leaves nothing of {len(dataset)} images: lower it")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard!r}: expected (rank, size) with 0 <= rank < size")
    return ImageLoader(dataset, batch_size, workers, shuffle, seed, skip_bad, drop_last, pin_memory, shard, worker_init)


def subset(dataset: Any, samples: int, *, seed: int | None = None) -> Any:
    """A class-balanced part of a dataset, in which the classes alternate.

    Args:
        dataset: An `ImageDataset` or `digits(...)`: anything with `targets` and `select(indices)`.
        samples: Number of samples. With fewer samples than classes, evenly spaced classes give one each; the share of a
            class that runs out goes to the others; more samples than there are give all of them and a warning.
        seed: Seed of a random choice within each class; None: evenly spaced images.

    Raises:
        ValueError: `samples` below 1.
    """
    require_int("samples", samples, 1, strict=True)
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


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[BadImage]]:
    good = [item for item in items if not isinstance(item, BadImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    targets = torch.tensor([int(label) for _, label in good], dtype=torch.long)
    return images, targets, [item for item in items if isinstance(item, BadImage)]


def _shares(members: list[list[int]], samples: int, rng: np.random.Generator | None) -> list[int]:
    """Number of samples of each class, as equal as the sizes of the classes allow."""
    shares = [0] * len(members)
    left = min(samples, sum(map(len, members)))
    while left:
        open_ = [i for i, group in enumerate(members) if shares[i] < len(group)]
        # Each class gets one more sample; if fewer are left than classes, evenly spaced classes do.
        for i in open_ if left >= len(open_) else [open_[j] for j in _spread(len(open_), left, rng)]:
            shares[i] += 1
            left -= 1
    return shares


def _spread(count: int, wanted: int, rng: np.random.Generator | None) -> list[int]:
    """`wanted` different positions out of `count`, evenly spaced or random."""
    if rng is not None:
        return rng.permutation(count)[:wanted].tolist()
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
