"""Accuracy of a classifier, and its agreement with another one, as exact counts; percentages are made when they are shown."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import batches
from ..models.properties import eval_mode
from ..runtime import progress
from ..runtime.processes import Processes
from .intervals import wilson_interval
from .runner import ModelRunner


@dataclass(frozen=True)
class Score:
    """Correctly classified images, counted over all processes. Percentages run from 0 to 100."""

    hits: int  # images whose class has the largest logit
    hits5: int | None  # images whose class is among the five largest logits; None with five classes or fewer
    images: int
    same: int | None = None  # images for which a reference model predicts the same class; None without a reference

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
    """A score, and what else a pass over the data shows."""

    images_per_second: float  # transfer and forward of this model alone, without the first of several batches
    kl: float | None = None  # mean KL(reference ‖ model) of the class probabilities in bits; None without a reference
    skipped: int = 0  # unreadable images that the loader omitted

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, accuracies in percent."""
        own = {"images_per_second": self.images_per_second, "kl": self.kl, "skipped": self.skipped}
        return super().to_dict() | own


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    description: str = "Evaluate",
    stop_signal: Callable[[], int] = lambda: 0,
) -> Evaluation:
    """Measure a classifier's accuracy and, with a reference, how far it differs from that model.

    Args:
        model: Maps images [N, C, H, W] to logits [N, classes]. It runs on the device and in the dtype of its parameters,
            in eval mode; afterwards every module is back in its previous mode. A tuple of logits (the two heads of a
            distilled model) is averaged.
        loader: Batches of images and class indices [N]; see `data.batches`.
        reference: Another classifier with the same classes, run on the same batches.
        description: Text of the progress bar.
        stop_signal: Returns the number of the signal that asked for a stop, or 0; called between batches.

    Raises:
        StoppedError: `stop_signal` did not return 0.
        ValueError: The loader is empty, labels do not fit the outputs, or a model is spread over several devices.
        NonFiniteActivationError: Logits are NaN or infinite; the message names the batch.
    """
    runners = [ModelRunner(m) for m in (model, reference) if m is not None]
    count = hits = hits5 = same = 0
    divergence, classes, times = 0.0, 0, []
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.enter_context(eval_mode(runner.model))
        for batch in batches.read(progress.track(loader, description), model):
            if stop_signal():
                raise StoppedError
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


class StoppedError(Exception):
    """Somebody asked for a stop while images were read."""


def score(
    model: nn.Module,
    loader: Iterable,
    processes: Processes,
    *,
    reference: nn.Module | None = None,
    stop_signal: Callable[[], int] = lambda: 0,
    description: str = "Validate",
) -> Score | None:
    """Count the images that `model` classifies correctly, each of the `processes` on its share; arguments as for `evaluate`.

    Returns the same score in all processes; None if one of them was asked to stop.
    """
    found: tuple[int, int | None, int, int | None] | None = None
    stopped = False
    with processes.all_or_none(description):
        if not isinstance(loader, Sized) or len(loader):  # with few images, a process may have none
            try:
                own = evaluate(model, loader, reference=reference, description=description, stop_signal=stop_signal)
            except StoppedError:
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
