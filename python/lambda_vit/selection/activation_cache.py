"""What goes into the first block, batch by batch, kept between passes in memory or on disk so that images are read once.

How much that takes is known from the first batch, before anything is kept: a budget that it does not fit is an error, or
with "auto" means that nothing is kept.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lambda_kernels.ops.checks import require_int

from ..data import batches
from ..data.batches import Images
from ..runtime.formatting import format_size
from ..runtime.memory import free_memory
from .paths import Node, PathRunner, SkippedBlocks, Tokens, node

CACHES = ("auto", "ram", "disk", "none")

# Of the memory that is free, what a cache takes without having been told; of the disk, what it leaves free.
RAM_SHARE = 0.25
DISK_RESERVE = 1 << 30


class PrefixCache:
    """Of one batch. What it holds never exceeds what the paths that were announced last have as prefixes."""

    def __init__(self) -> None:
        self._wanted: frozenset[Node] = frozenset()
        self._tokens: dict[Node, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def announce(self, paths: Collection[SkippedBlocks], chosen: Collection[int]) -> None:
        """Keep from now on what `paths` begin with up to the blocks `chosen`, and drop all else."""
        self._wanted = frozenset(node(path, at) for path in paths for at in chosen)
        self._tokens = {key: x for key, x in self._tokens.items() if key in self._wanted}

    def find(self, key: Node) -> Tensor | None:
        """The tokens that go into block `key[0]`, if they are kept."""
        return self._tokens.get(key)

    def offer(self, key: Node, x: Tensor) -> None:
        """Keep `x`, if it is wanted."""
        if key in self._wanted:
            self._tokens[key] = x


@dataclass
class Batch:
    """A batch as the passes see it; all tensors where the model is.

    Attributes:
        number: From 0, among the batches of this process.
        start: What the paths begin from.
        targets: int64 [N]; None where the loader gives none.
        full: The full model's logits, once somebody has put them there; they are kept with the rest.
        images: While they are at hand, for messages.
        prefixes: Tokens further inside, from one pass to the next where there is memory for them.
    """

    number: int
    start: Tokens
    targets: Tensor | None
    full: Tensor | None = None
    images: Images | None = None
    prefixes: PrefixCache = field(default_factory=PrefixCache)

    def __len__(self) -> int:
        return len(self.start.tokens)


@dataclass(frozen=True)
class CachePlan:
    """What is kept between passes: "ram", "disk" or "none", what all of it takes, and why it was decided so.

    `inside` is what the tokens of all images take at one place inside one path, and `spare` what may be spent on such.
    """

    kind: str
    bytes: int | None
    reason: str
    inside: int = 0
    spare: int = 0


class ActivationCache:
    """Batches of tokens out of a loader of images; iterate as often as needed, inside `with`.

    Args:
        runner: Embeds images.
        loader: Yields images, or tuples that begin with images and targets; iterated once per pass, or once in all.
        device: Where the model is.
        dtype: Of the model.
        cache: "ram", "disk", "none"; "auto" is "ram" where it fits into the budget, else "none".
        budget: Bytes that the cache of this process may take. None: a quarter of the memory that is free, or on disk all
            but 1 GiB of what is free, shared by the processes of this machine.
        folder: Where "disk" makes a folder of its own, which is removed in the end. None: the system's temporary folder.
        classes: Outputs of the classifier, kept too.

    Attributes:
        plan: What was decided; None before the first batch.

    Raises:
        ValueError: `cache` or `budget` is wrong; while iterating, the cache requested by name does not fit.
    """

    def __init__(
        self,
        runner: PathRunner,
        loader: Iterable,
        device: torch.device,
        dtype: torch.dtype,
        *,
        cache: str = "auto",
        budget: int | None = None,
        folder: Path | None = None,
        classes: int = 0,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}; got {cache!r}")
        if budget is not None:
            require_int("cache_budget", budget, 1, more=", a number of bytes")
        self.plan: CachePlan | None = None
        self._runner, self._loader, self._device, self._dtype = runner, loader, device, dtype
        self._cache, self._budget, self._folder, self._classes = cache, budget, folder, classes
        self._kept: list[Batch | Path] = []
        self._complete = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept, self._complete = [], False
        self._stack.close()

    def __len__(self) -> int:
        """Batches of a pass; TypeError where the loader does not know."""
        return len(self._loader)  # type: ignore[arg-type]  # who calls this takes the TypeError

    def __iter__(self) -> Iterator[Batch]:
        if self._complete:
            for kept in self._kept:
                yield self._there(self._load(kept) if isinstance(kept, Path) else kept)
            return
        self._kept = []
        for number, item in enumerate(self._loader):
            images, targets = _parts(item)
            if not batches.count(images):
                continue
            images = batches.to(images, self._device, self._dtype)
            if targets is not None:
                targets = targets.to(self._device, torch.int64, non_blocking=True)
            batch = Batch(number, self._runner.embed(images), targets, images=images)
            del images, targets, item
            if self.plan is None:
                self.plan = self._decide(batch)
            yield batch
            self._keep(batch)
            # Whoever still holds the batch must not hold its tensors while the next one is embedded.
            batch.start = batch.targets = batch.full = batch.images = None
        self._complete = self.plan is not None and self.plan.kind != "none"

    def _decide(self, batch: Batch) -> CachePlan:
        if self._cache == "none":
            return CachePlan("none", None, "as asked for: every pass reads the images again")
        kept = [batch.start.tokens, batch.targets, *batches.tensors(batch.start.images).values()]
        each = sum(t[0].numel() * t.element_size() for t in kept if t is not None)
        each += self._classes * batch.start.tokens.element_size()
        tokens = batch.start.tokens[0].numel() * batch.start.tokens.element_size()
        images = _images(self._loader, len(batch.start.tokens))
        if images is None:
            if self._cache != "auto":
                raise ValueError(
                    f"cache={self._cache!r} is sized before it starts, but the loader does not say how long it is: pass "
                    "one with a length, or cache='none'"
                )
            return CachePlan("none", None, "the loader does not say how long it is")
        needed = each * images
        kind = "disk" if self._cache == "disk" else "ram"
        budget, named = self._budget, "the budget"
        if kind == "disk":
            self._folder = Path(self._folder or tempfile.gettempdir())
            self._folder.mkdir(parents=True, exist_ok=True)
            free = max(0, shutil.disk_usage(self._folder).free - DISK_RESERVE) // _processes_here()
            if budget is None or free < budget:
                budget, named = free, f"what may be taken of the disk of {self._folder}"
        elif budget is None:
            budget, named = _free_memory(), "a quarter of the free memory"
        fits = needed <= budget
        reason = f"{images:,} images take {format_size(needed)}, {named} is {format_size(budget)}"
        if fits:
            # Where the tokens have to go to the device first, running the blocks again is the faster way.
            spare = budget - needed if kind == "ram" and self._device.type == "cpu" else 0
            return CachePlan(kind, needed, reason, tokens * images, spare)
        if self._cache == "auto":
            return CachePlan("none", needed, f"{reason}: every pass reads the images again")
        raise ValueError(
            f"cache={kind!r} does not fit: {reason}. Take fewer images, a larger budget (--cache-budget), or "
            f"{'disk or none' if kind == 'ram' else 'none'} (--cache)"
        )

    def _keep(self, batch: Batch) -> None:
        if self.plan.kind == "none":
            return
        # Views of a larger tensor would keep all of it alive.
        kept = _mapped(batch, lambda t: t.detach().cpu().clone() if t.device.type == "cpu" else t.detach().cpu())
        self._kept.append(self._store(kept) if self.plan.kind == "disk" else kept)

    def _there(self, batch: Batch) -> Batch:
        return _mapped(batch, lambda t: t.to(self._device, non_blocking=True))

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


def _parts(item: Any) -> tuple[Images, Tensor | None]:
    """Images, and what labels there are, of what a loader gave: images alone, or first in a tuple."""
    images = batches.images_of(item)
    if images is item or len(item) < 2:
        return images, None
    try:
        targets = torch.as_tensor(item[1])
    except (TypeError, ValueError, RuntimeError):  # names or paths: whoever needs labels says that there are none
        return images, None
    if targets.is_floating_point() and not torch.equal(targets, targets.round()):  # no classes: rounding would lie
        return images, None
    return images, targets if targets.shape == (batches.count(images),) else None


def _mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    def mapped(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    tokens, images = batch.start
    start = Tokens(mapped(tokens), None if images is None else batches.mapped(images, function))
    return Batch(batch.number, start, mapped(batch.targets), mapped(batch.full), prefixes=batch.prefixes)


def _images(loader: Iterable, of_a_batch: int) -> int | None:
    """How many images a pass has at most; None: the loader does not know."""
    if isinstance(loader, (list, tuple)):
        return sum(batches.count(batches.images_of(item)) for item in loader)
    try:
        number = len(loader)  # type: ignore[arg-type]  # the TypeError is meant
    except TypeError:
        return None
    # The first batch may be shorter than others, where an image of it was left out.
    full = getattr(loader, "batch_size", None)
    return number * max(of_a_batch, full if number > 1 and isinstance(full, int) else 0)


def _free_memory() -> int:
    """The share of the free memory that each process of this machine may take unasked."""
    free = free_memory()
    return int((4 << 30 if free is None else free) * RAM_SHARE / _processes_here())


def _processes_here() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def positions(paths: Collection[SkippedBlocks], depth: int, each: int, budget: int) -> tuple[int, ...]:
    """Before which blocks to keep tokens: every block, or every second, third …, as the budget allows; () for none.

    Args:
        paths: Of the round.
        depth: Number of blocks.
        each: Bytes of the tokens of all images, at one place of one path.
        budget: Bytes for all that is kept.
    """
    for stride in range(1, depth):
        chosen = tuple(range(stride, depth, stride))
        if nodes(paths, chosen) * each <= budget:
            return chosen
    return ()


def nodes(paths: Collection[SkippedBlocks], chosen: Collection[int]) -> int:
    """How many different prefixes `paths` have up to the blocks `chosen`."""
    return len({node(path, at) for path in paths for at in chosen})
