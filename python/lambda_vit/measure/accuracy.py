"""What a model is worth and what it costs: accuracy, agreement with another model, size, FLOPs, memory, latency."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.properties import eval_mode
from ..runtime import progress
from ..runtime.processes import Processes
from .intervals import wilson_interval
from .runner import _Figures, _Runner


@dataclasses.dataclass(frozen=True)
class Evaluation(_Figures):
    """Accuracy over a data set. Percentages run from 0 to 100."""

    count: int
    top1: float
    top5: float | None  # None with five classes or fewer, where it says nothing
    top1_interval: tuple[float, float]  # Wilson's, at 95 %
    images_per_second: float  # transfer and forward of this model alone, the first of several batches left out
    agreement: float | None = None  # images on which the reference predicts the same class, percent
    kl: float | None = None  # mean KL(reference ‖ model) of the class probabilities, bits
    skipped: int = 0  # unreadable images that the loader left out


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: nn.Module | None = None,
    device: torch.device | str | None = None,
    description: str = "Evaluate",
) -> Evaluation:
    """Measure a classifier's accuracy and, beside a reference, how far it has moved from it.

    Args:
        model: Maps images [N, C, H, W] to logits [N, classes]. It runs where its parameters are and in their dtype, in
            eval mode; afterwards every module is back in the mode it had. A tuple of logits (a distilled model's two
            heads) is averaged.
        loader: Batches of images and class indices [N].
        reference: Another classifier with the same classes, run on the same batches.
        device: Where the images go for a model without any parameter or buffer. Default: the CPU.
        description: Of the progress bar.

    Raises:
        ValueError: An empty loader, labels that do not fit the outputs, a model spread over several devices.
        NonFiniteActivationError: NaN or infinity among the logits; names the batch.
    """
    runners = [_Runner(m, device) for m in (model, reference) if m is not None]
    count = hits1 = hits5 = same = 0
    divergence, classes, times = 0.0, 0, []
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.enter_context(eval_mode(runner.model))
        for batch, (images, labels) in enumerate(progress.track(loader, description)):
            started = time.perf_counter()
            logits = runners[0].logits(images, f"batch {batch}")
            times.append((len(images), time.perf_counter() - started))
            labels = torch.as_tensor(labels).cpu()
            classes = logits.shape[1]
            _check_labels(labels, logits, batch)
            ranked = logits.topk(min(5, classes)).indices
            count += len(labels)
            hits1 += int((ranked[:, 0] == labels).sum())
            hits5 += int((ranked == labels[:, None]).sum())
            if reference is not None:
                wanted = runners[1].logits(images, f"batch {batch} of the reference")
                if wanted.shape != logits.shape:
                    raise ValueError(
                        f"reference has {wanted.shape[1]} classes and the model {classes}: they must be the same"
                    )
                same += int((wanted.argmax(1) == ranked[:, 0]).sum())
                log_p, log_q = wanted.log_softmax(1), logits.log_softmax(1)
                divergence += float((log_p.exp() * (log_p - log_q)).sum()) / math.log(2)
    if not count:
        raise ValueError("the loader gave no images: there is nothing to evaluate")
    low, high = wilson_interval(hits1, count)
    # The first batch pays for kernel selection and compilation.
    timed = times[1:] or times
    return Evaluation(
        count=count,
        top1=100 * hits1 / count,
        top5=100 * hits5 / count if classes > 5 else None,
        top1_interval=(100 * low, 100 * high),
        images_per_second=sum(n for n, _ in timed) / sum(t for _, t in timed),
        agreement=None if reference is None else 100 * same / count,
        kl=None if reference is None else divergence / count,
        skipped=len(getattr(loader, "bad", ())),
    )


def _check_labels(labels: Tensor, logits: Tensor, batch: int) -> None:
    count, classes = logits.shape
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels of batch {batch} are {labels.dtype} {tuple(labels.shape)}: expected class indices [{count}]"
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"batch {batch} has labels {int(labels.min())}…{int(labels.max())} and the model {classes} outputs: open "
            f"the data with num_classes={classes}, or use a model made for these classes"
        )


@dataclass(frozen=True)
class Score:
    """Images whose class came out first, or among the first five, over all processes."""

    hits: int
    hits5: int | None  # None with five classes or fewer
    images: int
    same: int | None = None  # how many got the reference's answer; None without one

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.hits / self.images

    @property
    def top5(self) -> float | None:
        """Percent."""
        return None if self.hits5 is None else 100 * self.hits5 / self.images

    @property
    def agreement(self) -> float | None:
        """Percent."""
        return None if self.same is None else 100 * self.same / self.images

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, in percent; the interval is Wilson's at 95 %. `agreement` is there if a reference was."""
        low, high = wilson_interval(self.hits, self.images)
        return {
            "top1": self.top1,
            "top1_interval": [100 * low, 100 * high],
            "top5": self.top5,
            "images": self.images,
            **({} if self.same is None else {"agreement": self.agreement}),
        }


class _StoppedError(Exception):
    """Asked to stop while images were read."""


class _Watched:
    """A loader that stops between batches when asked."""

    def __init__(self, loader: Iterable, asked: Callable[[], int]) -> None:
        self._loader, self._asked = loader, asked

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # the TypeError is meant

    def __iter__(self) -> Iterator:
        for batch in self._loader:
            if self._asked():
                raise _StoppedError
            yield batch


def score(
    model: nn.Module,
    loader: Iterable,
    processes: Processes,
    *,
    reference: nn.Module | None = None,
    asked: Callable[[], int] = lambda: 0,
    description: str = "Validate",
) -> Score | None:
    """Count what `model` gets right, each process on its own batches.

    Args:
        model: A classifier, evaluated in its own precision.
        loader: This process's share of the images: batches of images and class indices.
        processes: All call this.
        reference: Another classifier of the same classes, whose answers are compared.
        asked: The number of a signal to stop on, or 0; read between batches.
        description: Of the progress bar.

    Returns:
        The same in all processes; None where one of them was asked to stop.

    Raises:
        ValueError: No images at all, or labels that do not fit the model.
        NonFiniteActivationError: NaN or infinity among the logits.
        RuntimeError: Another process failed.
    """
    found: tuple[int, int | None, int, int | None] = (0, None, 0, None)
    stopped = False
    with processes.all_or_none(description):
        if not isinstance(loader, Sized) or len(loader):  # with few images, a process may have none
            try:
                result = evaluate(model, _Watched(loader, asked), reference=reference, description=description)
            except _StoppedError:
                stopped = True
            else:
                hits5 = None if result.top5 is None else round(result.top5 * result.count / 100)
                same = None if reference is None else round(result.agreement * result.count / 100)
                found = (round(result.top1 * result.count / 100), hits5, result.count, same)
    gathered = processes.gather((found, stopped))
    if any(stopped for _, stopped in gathered):
        return None
    parts = [part for part, _ in gathered if part[2]]
    if not parts:
        raise ValueError("the validation loader gave no images: there is nothing to evaluate")
    fives = [part[1] for part in parts]
    hits, images = sum(part[0] for part in parts), sum(part[2] for part in parts)
    same = None if reference is None else sum(part[3] for part in parts)
    return Score(hits, None if None in fives else sum(fives), images, same)
