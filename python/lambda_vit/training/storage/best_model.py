"""The best model so far: scored with the attention really gone, written when it is found, and kept with the checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from lambda_kernels import CheckpointError, save_pretrained
from lambda_kernels.files import write_json

from ...measure.accuracy import Score
from ...runtime.processes import Processes

SCORE = "score.json"


class Best:
    """Keeps the model with the highest top-1; of equals, the first.

    A model that is offered is written beside the folder and replaces it with the next `commit`, after the checkpoint that
    knows of it; the one before is retained until the next. So a run that resumes from a checkpoint finds the model which
    that checkpoint calls the best, even if a later one was found before the run was killed, or the newest checkpoint was
    damaged.

    Args:
        folder: Where `save_pretrained` writes it, with `score.json`; None: only the score is kept.
        processes: All call everything here alike; rank 0 writes.
        save_kwargs: Further arguments of `save_pretrained`.

    Attributes:
        score: Of the best; None before there is one.
        epoch: At whose end it was measured, from 1.
        step: Optimizer steps done by then.
        weights: "model", or "ema" for the average of the weights.
    """

    def __init__(self, folder: Path | None, processes: Processes, save_kwargs: dict[str, Any]) -> None:
        self._folder, self._processes, self._save_kwargs = folder, processes, save_kwargs
        self.score: Score | None = None
        self.epoch = self.step = 0
        self.weights = ""
        if folder is not None:
            self._next, self._old = (folder.with_name(f".{folder.name}.{name}") for name in ("next", "old"))

    def offer(self, model: nn.Module, score: Score, weights: str, epoch: int, step: int) -> bool:
        """Take `model` if it beats what there is; whether it did.

        Raises:
            UnsupportedModelError: Its attention is still under dilution.
            OSError: It cannot be written.
        """
        if self.score is not None and score.hits <= self.score.hits:
            return False
        self.score, self.weights, self.epoch, self.step = score, weights, epoch, step
        with self._processes.all_or_none("Write the best model"):
            if self._folder is not None and self._processes.is_main:
                save_pretrained(model, self._next, **self._save_kwargs)
                write_json(self._next / SCORE, self.to_dict())
        return True

    def commit(self) -> None:
        """Put what was offered in its place."""
        with self._processes.all_or_none("Write the best model"):
            if self._folder is not None and self._processes.is_main and self._is(self._next):
                self._take(self._next)

    def settle(self) -> None:
        """Remove the previous best model: no checkpoint refers to it any more."""
        with self._processes.all_or_none("Remove the model that was the best before"):
            if self._folder is not None and self._processes.is_main:
                shutil.rmtree(self._old, ignore_errors=True)

    def to_dict(self) -> dict[str, Any] | None:
        """As plain JSON types: epoch, step, weights, and `Score.to_dict`; None before there is one."""
        if self.score is None:
            return None
        return {"epoch": self.epoch, "step": self.step, "weights": self.weights, **self.score.to_dict()}

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; the model itself is in the folder."""
        if self.score is None:
            return None
        counts = [self.score.hits, self.score.hits5, self.score.images]
        return {"counts": counts, "epoch": self.epoch, "step": self.step, "weights": self.weights}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` returned, and the model that belongs to it.

        Raises:
            CheckpointError: That model is not there any more.
        """
        self.score = None if state is None else Score(*state["counts"])
        if state is not None:
            self.epoch, self.step, self.weights = state["epoch"], state["step"], state["weights"]
        with self._processes.all_or_none("Find the best model"):
            if self._folder is not None and self._processes.is_main:
                self._find()

    def _find(self) -> None:
        places = (self._folder, self._next, self._old)
        if self.score is not None:
            found = next((place for place in places if self._is(place)), None)
            if found is None:
                raise CheckpointError(
                    f"{self._folder} does not hold the best model of the run that is to go on (epoch {self.epoch}, top-1 "
                    f"{self.score.top1:.2f} %). Put it back, or start over"
                )
            self._take(found)
        for place in places if self.score is None else [self._next]:
            shutil.rmtree(place, ignore_errors=True)

    def _is(self, place: Path) -> bool:
        """Whether `place` holds the model that is the best."""
        try:
            return json.loads((place / SCORE).read_text(encoding="utf-8")) == self.to_dict()
        except (OSError, ValueError):
            return False

    def _take(self, place: Path) -> None:
        if place == self._folder:
            return
        if place != self._old:
            shutil.rmtree(self._old, ignore_errors=True)
            if self._folder.exists():
                self._folder.rename(self._old)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
        place.rename(self._folder)
