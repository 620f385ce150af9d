"""Accuracy in the middle of training: shared over the processes, and given up at once where a run is asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..evaluate import evaluate, wilson_interval
from ..processes import Processes


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
    with processes.together(description):
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
