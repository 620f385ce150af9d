"""Accuracy of a classifier, and its agreement with another one, as exact counts; percentages are made when they are shown."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import batches
from ..models.properties import eval_mode
from ..runtime import progress
from ..runtime.processes import Processes
from .intervals import wilson_interval
from .runner import ModelRunner


@dataclass(frozen=True)
class Score:
    """Correctly classified images, counted over all processes. Percentages run from 0 to 100.

    Attributes:
        hits: Images whose class has the largest logit.
        hits5: Images whose class is among the five largest logits; None with five classes or fewer.
        images: All images.
        same: Images for which a reference model predicts the same class; None without a reference.
    """

    hits: int
    hits5: int | None
    images: int
    same: int | None = None

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.hits / self.images

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Wilson's interval at 95 %, in percent."""
        low, high = wilson_interval(self.hits, self.images)
        return 100 * low, 100 * high

    @property
    def top5(self) -> float | None:
        """Percent."""
        return None if self.hits5 is None else 100 * self.hits5 / self.images

    @property
    def agreement(self) -> float | None:
        """Percent."""
        return None if self.same is None else 100 * self.same / self.images

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, in percent; "agreement" only where there was a reference."""
        return {
            "top1": self.top1,
            "top1_interval": list(self.top1_interval),
            "top5": self.top5,
            "images": self.images,
            **({} if self.same is None else {"agreement": self.agreement}),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation(Score):
    """A score, and what else a pass over the data shows.

    Attributes:
        images_per_second: Transfer and forward of this model alone, without the first of several batches.
        kl: Mean KL(reference ‖ model) of the class probabilities in bits; None without a reference.
        skipped: Unreadable images that the loader omitted.
    """

    images_per_second: float
    kl: float | None = None
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, accuracies in percent."""
        own = {"images_per_second": self.images_per_second, "kl": self.kl, "skipped": self.skipped}
        return super().to_dict() | own


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    device: torch.device | str | None = None,
    description: str = "Evaluate",
) -> Evaluation:
    """Measure a classifier's accuracy and, with a reference, how far it differs from that model.

    Args:
        model: Maps images [N, C, H, W] to logits [N, classes]. It runs on the device and in the dtype of its parameters,
            in eval mode; afterwards every module is back in its previous mode. A tuple of logits (the two heads of a
            distilled model) is averaged.
        loader: Batches of images and class indices [N]; see `data.batches`.
        reference: Another classifier with the same classes, run on the same batches.
        device: Device of the images if a model has no parameters or buffers. Default: the CPU.
        description: Text of the progress bar.

    Raises:
        ValueError: The loader is empty, labels do not fit the outputs, or a model is spread over several devices.
        NonFiniteActivationError: Logits are NaN or infinite; the message names the batch.
    """
    runners = [ModelRunner(m, device) for m in (model, reference) if m is not None]
    count = hits = hits5 = same = 0
    divergence, classes, times = 0.0, 0, []
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.enter_context(eval_mode(runner.model))
        for batch in batches.read(progress.track(loader, description), model):
            images, labels = batch.images, batch.class_indices().cpu()
            started = time.perf_counter()
            logits = runners[0].logits(images, f"batch {batch.number}")
            times.append((len(labels), time.perf_counter() - started))
            classes = logits.shape[1]
            batches.check_range(labels, classes, batch.number)
            ranked = logits.topk(min(5, classes)).indices
            count += len(labels)
            hits += int((ranked[:, 0] == labels).sum())
            hits5 += int((ranked == labels[:, None]).sum())
            if reference is not None:
                wanted = runners[1].logits(images, f"batch {batch.number} of the reference")
                if wanted.shape != logits.shape:
                    raise ValueError(
                        f"reference has {wanted.shape[1]} classes and the model {classes}: they must be the same"
                    )
                same += int((wanted.argmax(1) == ranked[:, 0]).sum())
                log_p, log_q = wanted.log_softmax(1), logits.log_softmax(1)
                divergence += float((log_p.exp() * (log_p - log_q)).sum()) / math.log(2)
    if not count:
        raise ValueError("the loader gave no images: there is nothing to evaluate")
    # The first batch pays for kernel selection and compilation.
    timed = times[1:] or times
    return Evaluation(
        hits=hits,
        hits5=hits5 if classes > 5 else None,
        images=count,
        same=None if reference is None else same,
        images_per_second=sum(n for n, _ in timed) / sum(t for _, t in timed),
        kl=None if reference is None else divergence / count,
        skipped=len(getattr(loader, "bad", ())),
    )


class _StoppedError(Exception):
    """A request to stop came while images were read."""


class _StoppableLoader:
    """A loader that raises between batches once a stop was asked for."""

    def __init__(self, loader: Iterable, stop_signal: Callable[[], int]) -> None:
        self._loader, self._stop_signal = loader, stop_signal

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # the TypeError is meant

    def __iter__(self) -> Iterator:
        for batch in self._loader:
            if self._stop_signal():
                raise _StoppedError
            yield batch


def score(
    model: nn.Module,
    loader: Iterable,
    processes: Processes,
    *,
    reference: nn.Module | None = None,
    stop_signal: Callable[[], int] = lambda: 0,
    description: str = "Validate",
) -> Score | None:
    """Count the images that `model` classifies correctly, each process on its own batches.

    Args:
        model: A classifier, evaluated in its own precision.
        loader: This process's share of the images: batches of images and class indices.
        processes: The processes that share the images; all of them must call this function.
        reference: Another classifier of the same classes, whose predictions are compared.
        stop_signal: Returns the number of the signal that asked for a stop, or 0; called between batches.
        description: Text of the progress bar.

    Returns:
        The same score in all processes; None if one of them was asked to stop.

    Raises:
        ValueError: There are no images, or labels do not fit the model.
        NonFiniteActivationError: Logits are NaN or infinite.
        RuntimeError: Another process failed.
    """
    found: tuple[int, int | None, int, int | None] | None = None
    stopped = False
    with processes.all_or_none(description):
        if not isinstance(loader, Sized) or len(loader):  # with few images, a process may have none
            try:
                own = evaluate(
                    model, _StoppableLoader(loader, stop_signal), reference=reference, description=description
                )
            except _StoppedError:
                stopped = True
            else:
                found = own.hits, own.hits5, own.images, own.same
    gathered = processes.gather((found, stopped))
    if any(stopped for _, stopped in gathered):
        return None
    counts = [found for found, _ in gathered if found is not None]
    if not counts:
        raise ValueError("the validation loader gave no images: there is nothing to evaluate")
    hits, hits5, images, same = (None if None in column else sum(column) for column in zip(*counts, strict=True))
    return Score(hits, hits5, images, same)
