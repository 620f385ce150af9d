"""The best model so far: scored with the attention really gone, and written when it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lambda_kernels import save_pretrained

from ..processes import Processes
from .scoring import Score


class Best:
    """Keeps the model with the highest top-1; of equals, the first.

    Args:
        folder: Where `save_pretrained` writes it; None: only the score is kept.
        processes: All call `offer` alike; rank 0 writes.
        saving: Further arguments of `save_pretrained`.

    Attributes:
        score: Of the best; None before there is one.
        epoch: At whose end it was measured, from 1.
        step: Optimizer steps done by then.
        weights: "model", or "ema" for the average of the weights.
    """

    def __init__(self, folder: Path | None, processes: Processes, saving: dict[str, Any]) -> None:
        self._folder, self._processes, self._saving = folder, processes, saving
        self.score: Score | None = None
        self.epoch = self.step = 0
        self.weights = ""

    def offer(self, model: nn.Module, score: Score, weights: str, epoch: int, step: int) -> bool:
        """Take `model` if it beats what there is; whether it did.

        Raises:
            UnsupportedModelError: Its attention is still under dilution.
            OSError: It cannot be written.
        """
        if self.score is not None and score.hits <= self.score.hits:
            return False
        with self._processes.together("Write the best model"):
            if self._folder is not None and self._processes.leads:
                save_pretrained(model, self._folder, **self._saving)
        self.score, self.weights, self.epoch, self.step = score, weights, epoch, step
        return True

    def to_dict(self) -> dict[str, Any] | None:
        """As plain JSON types: epoch, step, weights, and `Score.to_dict`; None before there is one."""
        if self.score is None:
            return None
        return {"epoch": self.epoch, "step": self.step, "weights": self.weights, **self.score.to_dict()}

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint. The model itself is in the folder: it is found again where the run goes on."""
        if self.score is None:
            return None
        counts = [self.score.hits, self.score.hits5, self.score.images]
        return {"counts": counts, "epoch": self.epoch, "step": self.step, "weights": self.weights}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` returned."""
        self.score = None if state is None else Score(*state["counts"])
        if state is not None:
            self.epoch, self.step, self.weights = state["epoch"], state["step"], state["weights"]
