"""Training images, step by step, the same whatever computes them.

A step takes `batch_size` images, cut into M micro-batches. What a micro-batch holds follows from (seed, epoch, step, its
number) alone: not from the number of processes or workers, nor from what was drawn before. So a run that goes on at step s
sees what it would have seen, with no state to keep but s.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lambda_kernels.ops.checks import require_int

from ...data.batches import LoadedBatch, SizedLoader, check_repeatable, read
from ...data.fingerprints import data_fingerprint
from ...data.images import BadImage, CorruptImageError, SizedDataset, corrupt_message
from ...runtime.seeding import mixed_seed, preserved, seed_all
from ...runtime.signals import block_signals, init_worker, spare_worker
from ..recipe import Recipe

T = TypeVar("T")


class MicroBatch(NamedTuple):
    """What one forward and backward take."""

    number: int  # in the step, from 0 to M − 1
    images: Tensor  # float [m, channels, height, width]
    targets: Tensor  # int64 [m]


class TrainingStream(abc.ABC):
    """What an epoch consists of, and the part of it that this process computes.

    Of the M micro-batches of every step, the process of rank r among W has those from r·M/W up to (r + 1)·M/W. What is
    left over at the end of an epoch, less than one step, is not used; the order differs from epoch to epoch.

    Args:
        images: In the data.
        recipe: Gives batch_size, micro_batch, repeated_aug and seed.
        shard: (rank, size) of this process.
        skip_bad: How many different unreadable images to leave out before giving up.
        what: How messages call the data.

    Attributes:
        steps_per_epoch: Optimizer steps.
        batch_size: Images per step, over all processes.
        micro_batches: M.
        micro_batch_size: Images in each; `batch_size` over the number of processes where the recipe says nothing. It is
            part of what a run computes: to go on with another number of processes, give the recipe the size of before.
        numbers: Of the micro-batches of this process.
        exact: None where a run can go on exactly where it stopped; else why it cannot.

    Raises:
        ValueError: The processes cannot share the micro-batches, or there is less data than one step takes.
    """

    exact: str | None = None

    def __init__(self, images: int, recipe: Recipe, *, shard: tuple[int, int], skip_bad: int, what: str) -> None:
        rank, size = shard
        if not 0 <= rank < size:
            raise ValueError(f"shard={shard!r}: expected (rank, size) with 0 <= rank < size")
        if recipe.micro_batch is None and recipe.batch_size % size:
            _refuse_size(size, recipe.batch_size, f"the {recipe.batch_size} images of a step")
        self.batch_size = recipe.batch_size
        self.micro_batch_size = recipe.micro_batch or recipe.batch_size // size
        self.micro_batches = recipe.check_micro_batch(self.micro_batch_size)
        if self.micro_batches % size:
            _refuse_size(size, self.micro_batches, f"the {self.micro_batches} micro-batches of a step")
        own = self.micro_batches // size
        self.numbers = range(rank * own, (rank + 1) * own)
        self.steps_per_epoch = images // self.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"{what} has {images} images, a step takes batch_size={self.batch_size}: lower it")
        self.seed = recipe.seed
        self.repeated_aug = recipe.repeated_aug
        self.skip_bad = skip_bad
        self._images = images
        self._bad: dict[str, BadImage] = {}

    @property
    def images_per_epoch(self) -> int:
        """Images that the steps of an epoch take, over all processes."""
        return self.steps_per_epoch * self.batch_size

    @property
    def bad(self) -> list[str]:
        """Paths of the unreadable images met so far, each once. Others of the same micro-batch stood in for them."""
        return list(self._bad)

    @property
    def bad_images(self) -> list[BadImage]:
        """The same with the reasons: what a checkpoint keeps, and what processes tell each other."""
        return list(self._bad.values())

    def add_bad(self, images: Iterable[BadImage]) -> None:
        """Count unreadable images that another process met, or this run before it was stopped.

        Raises:
            CorruptImageError: There are now more than `skip_bad`.
        """
        self._bad.update((path, BadImage(path, reason)) for path, reason in images)
        if len(self._bad) > self.skip_bad:
            raise CorruptImageError(corrupt_message(self.bad_images, self.skip_bad))

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of each step of an epoch, from step `start` on; both count from 0.

        Starting another pass ends this one.

        Raises:
            ValueError: There is no such epoch or step.
            CorruptImageError: While iterating: more than `skip_bad` images cannot be read, or none of a micro-batch.
        """
        if epoch < 0 or not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"epoch={epoch}, start={start}: expected start from 0 to {self.steps_per_epoch}")
        return self._steps(epoch, start)

    @abc.abstractmethod
    def _steps(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]: ...

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """All that the micro-batches depend on, by name, as plain JSON types."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End workers. The stream can be used again."""

    def _checked(self, answer: Answer, step: int, number: int) -> MicroBatch:
        images, targets, bad = answer
        self.add_bad(bad)
        if not len(targets):
            raise CorruptImageError(
                f"nothing in micro-batch {number} of step {step} can stand in for what is unreadable: "
                + corrupt_message(list(bad), self.skip_bad)
            )
        return MicroBatch(number, images, targets)

    def _sizes(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "micro_batch": self.micro_batch_size, "repeated_aug": self.repeated_aug}

    def _fingerprint(self) -> dict[str, Any]:
        # Reads `dataset` and `batch_size` of the stream.
        known = data_fingerprint(self, labelled=True)
        return {**known, "micro-batch": self.micro_batch_size, "repeated_aug": self.repeated_aug, "seed": self.seed}

    def _order(self, epoch: int) -> np.ndarray:
        """Indices into the data `[steps, own micro-batches, m]` of an epoch."""
        seed = mixed_seed("order", self.seed, epoch)
        steps, parts, size = self.steps_per_epoch, self.micro_batches, self.micro_batch_size
        if not self.repeated_aug:
            order = np.random.default_rng(seed).permutation(self._images)[: steps * self.batch_size]
            return order.reshape(steps, parts, size)[:, self.numbers.start : self.numbers.stop]
        from timm.data.distributed_sampler import RepeatAugSampler

        # timm deals the views out to processes; here micro-batches take their place.
        streams = []
        for number in self.numbers:
            sampler = RepeatAugSampler(
                range(self._images), parts, number, num_repeats=self.repeated_aug, selected_round=0
            )
            sampler.set_epoch(seed)
            streams.append(np.fromiter(sampler, np.int64)[: steps * size].reshape(steps, size))
        return np.stack(streams, axis=1)


class _Request(NamedTuple):
    """One micro-batch, as workers are asked for it."""

    epoch: int
    first: int  # its place in the epoch, in images
    indices: list[int]


class Answer(NamedTuple):
    """A micro-batch as it comes from where it was read."""

    images: Tensor  # empty where none could be read
    targets: Tensor
    bad: list[BadImage]


def read_micro_batch(
    samples: Sequence[T], load: Callable[[T], tuple[Tensor, int] | BadImage], seed: int, epoch: int, first: int
) -> Answer:
    """Load samples whose places in the epoch start at `first`, each under a seed of its own.

    Where one cannot be read, the next readable one of them stands in for it, in another view.
    """

    def view(slot: int, sample: T) -> tuple[Tensor, int] | BadImage:
        seed_all(mixed_seed("image", seed, epoch, first + slot))
        return load(sample)

    with preserved():
        items: list[Any] = [view(slot, sample) for slot, sample in enumerate(samples)]
        bad = [item for item in items if isinstance(item, BadImage)]
        good = [slot for slot, item in enumerate(items) if not isinstance(item, BadImage)]
        if not good:
            return Answer(torch.empty(0), torch.empty(0, dtype=torch.long), bad)
        for slot, item in enumerate(items):
            if isinstance(item, BadImage):
                stand_in = next((s for s in good if s > slot), good[0])
                items[slot] = view(slot, samples[stand_in])
    return Answer(torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items]), bad)


@dataclasses.dataclass
class _Reader(Dataset):
    """Makes whole micro-batches, in a worker or in the process itself."""

    dataset: Dataset
    seed: int

    def __getitem__(self, request: _Request) -> Answer:
        return read_micro_batch(request.indices, self.dataset.__getitem__, self.seed, request.epoch, request.first)


class _Requests:
    """The sampler of a DataLoader that outlives epochs: what it gives is set before each pass."""

    def __init__(self) -> None:
        self.now: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.now


class DatasetStream(TrainingStream):
    """A map-style dataset of (float tensor, label), with random transforms or without.

    Args:
        dataset: `open_images(...)` with a transform, or any other. One with `on_bad` marks what it cannot read.
        recipe: As `TrainingStream` takes it, and so for `shard` and `skip_bad`.
        workers: Processes that read and decode; 0 does it in this one.
        prefetch: Micro-batches that every worker has ready.
        pin_memory: Page-locked images, where a CUDA device is there to use them.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        recipe: Recipe,
        *,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        skip_bad: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        for name, value, least in (("workers", workers, 0), ("skip_bad", skip_bad, 0), ("prefetch", prefetch, 1)):
            require_int(name, value, least, strict=True)
        super().__init__(len(dataset), recipe, shard=shard, skip_bad=skip_bad, what=_name(dataset))
        self.dataset = dataset
        self.workers = workers
        self._requests = _Requests()
        self._passes = 0
        marking = hasattr(dataset, "on_bad")
        self._loader = DataLoader(
            _Reader(dataclasses.replace(dataset, on_bad="mark") if marking else dataset, self.seed),
            batch_size=None,  # a request is a whole micro-batch
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=partial(init_worker, spare_worker),
            collate_fn=as_it_is,  # type: ignore[arg-type]  # a request comes as one answer, not as a list
            pin_memory=pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: the caller's is left alone
        )

    def _steps(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        self._passes += 1
        mine = self._passes
        # Nothing in it refers to the stream: workers that a ring of references holds take seconds to end.
        self._requests.now = _asked(epoch, start, self._order(epoch), self.numbers, self.batch_size)
        with block_signals():
            answers = iter(self._loader)
        try:
            for step in range(start, self.steps_per_epoch):
                if mine != self._passes:
                    raise RuntimeError("another pass over this stream was started: one at a time")
                yield [self._checked(next(answers), step, number) for number in self.numbers]
            next(answers, None)  # lets the workers see the end
        finally:
            answers = None  # a traceback would keep it, and the workers with it

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint()

    def describe(self) -> dict[str, Any]:
        known = self.dataset.describe() if hasattr(self.dataset, "describe") else {"images": len(self.dataset)}
        return {**known, **self._sizes(), "images_per_epoch": self.images_per_epoch, "workers": self.workers}

    def close(self) -> None:
        self._loader._iterator = None


class LoaderStream(TrainingStream):
    """Whatever a caller iterates over: every batch is a step of one micro-batch, of the size that it has.

    Args:
        loader: Yields images and class indices, and has a length; see `data.batches`. `set_epoch(epoch)` is called where
            there is one.
        model: Whose channels the images must have; None checks none.
        soft: Also accept the probabilities of the classes, float [N, classes], in place of indices.

    Raises:
        ValueError: The loader has no length, is empty, or can be iterated only once; while iterating: a batch does not hold
            images and labels that can be trained on.
    """

    exact = (
        "the batches come from a loader of your own, whose order and random transforms are not known here: a run that "
        "goes on reads past the batches of before, and may see others"
    )

    def __init__(self, loader: SizedLoader, model: nn.Module | None = None, *, soft: bool = False) -> None:
        try:
            self.steps_per_epoch = len(loader)
        except TypeError as error:
            raise ValueError("train_loader has no length: the schedules need to know the steps of an epoch") from error
        if not self.steps_per_epoch:
            raise ValueError("train_loader is empty: there is nothing to train on")
        check_repeatable("train_loader", loader)
        self.loader, self._model, self._soft = loader, model, soft
        self.batch_size = self.micro_batch_size = getattr(loader, "batch_size", None) or 0
        self.micro_batches, self.numbers = 1, range(1)
        self.seed, self.repeated_aug, self.skip_bad = getattr(loader, "seed", 0), 0, 0
        self._bad = {}

    @property
    def images_per_epoch(self) -> int:
        """0 where the loader does not tell its batch size."""
        return self.steps_per_epoch * self.batch_size

    @property
    def bad(self) -> list[str]:
        """As the loader counts them."""
        return list(getattr(self.loader, "bad", ()))

    def _steps(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        """May end early: a loader may leave out batches."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        for step, batch in enumerate(read(self.loader, self._model)):
            if isinstance(batch.images, dict):
                raise ValueError("training takes images [N, C, H, W], not the patches of NaFlexVit")
            if step >= start:
                yield [MicroBatch(0, batch.images, self._targets(batch))]

    def _targets(self, batch: LoadedBatch) -> Tensor:
        labels = batch.labels
        if not (self._soft and isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2):
            return batch.class_indices()
        if len(labels) != len(batch.images) or labels.shape[1] == 1:
            return batch.class_indices()
        if bool(((labels.sum(1) - 1).abs() > 0.01).any()):
            raise ValueError(
                f"labels of batch {batch.number} are not probabilities, which sum to 1 over the classes of an image: several "
                "labels per image cannot be trained"
            )
        return labels

    def fingerprint(self) -> dict[str, Any]:
        return {**data_fingerprint(self.loader, labelled=True), "batches": self.steps_per_epoch}

    def describe(self) -> dict[str, Any]:
        dataset = getattr(self.loader, "dataset", None)
        known = dataset.describe() if hasattr(dataset, "describe") else {}
        return {**known, "batch_size": self.batch_size, "steps_per_epoch": self.steps_per_epoch}


def _asked(epoch: int, start: int, order: np.ndarray, numbers: Sequence[int], batch_size: int) -> Iterator[_Request]:
    for step, parts in enumerate(order[start:], start):
        for number, indices in zip(numbers, parts, strict=True):
            yield _Request(epoch, step * batch_size + number * len(indices), indices.tolist())


def as_it_is(answer: Answer) -> Answer:
    """In place of a DataLoader's collation."""
    return answer


def _name(dataset: SizedDataset) -> str:
    if hasattr(dataset, "root"):
        return f"split {dataset.split!r} of {dataset.root}"
    return type(dataset).__name__


def _refuse_size(size: int, whole: int, what: str) -> None:
    allowed = [str(n) for n in range(1, whole + 1) if whole % n == 0]
    raise ValueError(f"{size} processes cannot share {what} evenly: start {', '.join(allowed)}, or change micro_batch")
