"""Caches the inputs of the first block between passes, in memory or on disk, so that images are read and embedded once.

The first batch tells the size of the cache. If it exceeds the budget, "auto" caches nothing and the other kinds fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lambda_kernels.ops.checks import require_int

from ..data import batches
from ..data.batches import Images
from ..runtime.formatting import format_size
from ..runtime.memory import free_memory
from .paths import PathRunner, Tokens
from .prefix_cache import PrefixCache

CACHES = ("auto", "ram", "disk", "none")

# The share of the free memory that a cache uses by default, and the bytes that it leaves free on a disk.
RAM_SHARE = 0.25
DISK_RESERVE = 1 << 30


@dataclass
class Batch:
    """A batch, with its tensors on the model's device."""

    number: int  # from 0, among the batches of this process
    start: Tokens  # where paths start
    targets: Tensor | None  # int64 [N]; None if the loader yields none
    full: Tensor | None = None  # the full model's logits, once they are computed; they are cached with the rest
    images: Images | None = None  # for messages; None if the batch comes from the cache

    def __len__(self) -> int:
        return len(self.start.tokens)


@dataclass(frozen=True)
class CachePlan:
    """What is cached between passes, its total size, and the reason."""

    kind: str  # "ram", "disk" or "none"
    bytes: int | None
    reason: str


class ActivationCache:
    """Embeds the images of a loader; iterate over its batches any number of times, inside `with`.

    The loader is iterated once per pass, or once if its batches are cached. "auto" is "ram" if the cache fits into the
    budget, otherwise "none". The default budget is a quarter of the free memory, or the free disk but 1 GiB, divided among
    the processes of this machine.
    """

    def __init__(
        self,
        runner: PathRunner,
        loader: Iterable,
        device: torch.device,
        dtype: torch.dtype,
        *,
        cache: str,
        budget: int | None,  # of this process, in bytes
        folder: str | Path | None,  # in which "disk" creates a temporary folder; None: the system's
        classes: int,  # number of the classifier's outputs, which are cached too
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}; got {cache!r}")
        if budget is not None:
            require_int("cache_budget", budget, 1, more=", a number of bytes", strict=True)
        self.plan: CachePlan | None = None  # None before the first batch
        self._runner, self._loader, self._device, self._dtype = runner, loader, device, dtype
        self._cache, self._budget, self._folder, self._classes = cache, budget, folder, classes
        self._kept: list[Batch | Path] = []
        self._complete = False
        self._stack = contextlib.ExitStack()
        self.prefixes = PrefixCache(runner.depth)  # tokens before later blocks, in what remains of the budget

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self._complete = False
        self._clear()
        self._stack.close()

    def __len__(self) -> int:
        """Return the number of batches of a pass; TypeError if the loader has no length."""
        return len(self._loader)  # type: ignore[arg-type]  # the caller handles the TypeError

    def __iter__(self) -> Iterator[Batch]:
        if self._complete:
            for kept in self._kept:
                batch = self._load(kept) if isinstance(kept, Path) else kept
                yield _mapped(batch, lambda t: t.to(self._device, non_blocking=True))
            return
        self._clear()
        empty = True
        for loaded in batches.read(self._loader, self._runner.model):
            empty, targets = False, None
            images = batches.to(loaded.images, self._device, self._dtype)
            with contextlib.suppress(ValueError):  # code that requires labels reports that there are none
                targets = loaded.class_indices().to(self._device, non_blocking=True)
            batch = Batch(loaded.number, self._runner.embed(images), targets, images=images)
            del images, targets, loaded
            if self.plan is None:
                self.plan = self._plan_cache(batch)
            yield batch
            self._keep(batch)
            # A caller that still holds the batch must not hold its tensors while the next one is embedded.
            batch.start = batch.targets = batch.full = batch.images = None
        if empty and self.plan is not None:
            raise ValueError("loader gave no images in a further pass: it must be iterable more than once")
        self._complete = self.plan is not None and self.plan.kind != "none"

    def _clear(self) -> None:
        self._kept = []
        self.prefixes.clear()

    def _plan_cache(self, batch: Batch) -> CachePlan:
        if self._cache == "none":
            return CachePlan("none", None, "as requested: every pass reads the images again")
        kept = [batch.start.tokens, batch.targets, *batches.tensors(batch.start.images).values()]
        each = sum(t[0].numel() * t.element_size() for t in kept if t is not None)
        each += self._classes * batch.start.tokens.element_size()
        tokens = batch.start.tokens[0].numel() * batch.start.tokens.element_size()
        images = _count_images(self._loader, len(batch.start.tokens))
        if images is None:
            if self._cache != "auto":
                raise ValueError(
                    f"cache={self._cache!r} requires a loader with a length, to compute its size in advance; pass one, or "
                    "cache='none'"
                )
            return CachePlan("none", None, "the loader has no length")
        needed = each * images
        kind = "disk" if self._cache == "disk" else "ram"
        budget, named = self._budget, "the budget"
        if kind == "disk":
            self._folder = Path(self._folder or tempfile.gettempdir())
            self._folder.mkdir(parents=True, exist_ok=True)
            free = max(0, shutil.disk_usage(self._folder).free - DISK_RESERVE) // _processes_here()
            if budget is None or free < budget:
                budget, named = free, f"the usable free space on the disk of {self._folder}"
        elif budget is None:
            budget, named = _free_memory(), "a quarter of the free memory"
        fits = needed <= budget
        reason = f"{images:,} images take {format_size(needed)}, {named} is {format_size(budget)}"
        if fits:
            # If tokens must be copied to the device first, running the blocks again is faster.
            if kind == "ram" and self._device.type == "cpu":
                self.prefixes.set_budget(tokens * images, budget - needed)
            return CachePlan(kind, needed, reason)
        if self._cache == "auto":
            return CachePlan("none", needed, f"{reason}: every pass reads the images again")
        raise ValueError(
            f"cache={kind!r} does not fit: {reason}. Use fewer images, a larger budget (--cache-budget), or "
            f"{'disk or none' if kind == 'ram' else 'none'} (--cache)"
        )

    def _keep(self, batch: Batch) -> None:
        if self.plan.kind == "none":
            return
        # A view of a larger tensor would keep all of that tensor alive.
        kept = _mapped(batch, lambda t: t.detach().cpu().clone() if t.device.type == "cpu" else t.detach().cpu())
        self._kept.append(self._store(kept) if self.plan.kind == "disk" else kept)

    def _store(self, batch: Batch) -> Path:
        if not self._kept:
            self._own = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lambda-vit-", dir=self._folder))
            )
        path = self._own / f"{batch.number}.safetensors"
        tensors = {
            "tokens": batch.start.tokens,
            **{f"images.{name}": tensor for name, tensor in batches.tensors(batch.start.images).items()},
            "targets": batch.targets,
            "full": batch.full,
        }
        try:
            save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write the cache {path}: {error}. Free some space, or use --cache none") from error
        return path

    def _load(self, path: Path) -> Batch:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot read the cache {path}: {error}. Was it removed? Run again") from error
        images = {name.removeprefix("images."): t for name, t in tensors.items() if name.startswith("images.")}
        start = Tokens(tensors["tokens"], batches.from_tensors(images))
        return Batch(int(path.stem), start, tensors.get("targets"), tensors.get("full"))


def _mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    def mapped(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    tokens, images = batch.start
    start = Tokens(mapped(tokens), None if images is None else batches.mapped(images, function))
    return Batch(batch.number, start, mapped(batch.targets), mapped(batch.full))


def _count_images(loader: Iterable, batch_images: int) -> int | None:
    """Return the largest possible number of images of a pass; None if the loader has no length."""
    if isinstance(loader, (list, tuple)):
        return sum(batches.count(batches.images_of(item)) for item in loader)
    try:
        number = len(loader)  # type: ignore[arg-type]  # the TypeError is handled
    except TypeError:
        return None
    # The first batch may be shorter than others if an image was skipped.
    full = getattr(loader, "batch_size", None)
    return number * max(batch_images, full if number > 1 and isinstance(full, int) else 0)


def _free_memory() -> int:
    """Return the part of the free memory that each process of this machine uses by default."""
    free = free_memory()
    return int((4 << 30 if free is None else free) * RAM_SHARE / _processes_here())


def _processes_here() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
