"""A training stream of tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lambda_vit.training.images.stream import MicroBatch, TrainingStream, _name
from lambda_vit.training.recipe import Recipe


class TensorStream(TrainingStream):
    """A `TensorDataset` of (images, labels), such as `digits(...)`: gathered as it is, without transforms.

    Args:
        dataset: With `tensors = (images [N, ...], labels [N])`, on any device.
        recipe: As `TrainingStream` takes it, and so for `shard`.
    """

    def __init__(self, dataset: TensorDataset, recipe: Recipe, *, shard: tuple[int, int] = (0, 1)) -> None:
        super().__init__(len(dataset), recipe, shard=shard, skip_bad=0, what=_name(dataset))
        self.dataset = dataset

    def _steps(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        images, labels = self.dataset.tensors
        for parts in torch.from_numpy(self._order(epoch)[start:]).to(images.device):
            yield [
                MicroBatch(number, images[indices], labels[indices].long())
                for number, indices in zip(self.numbers, parts, strict=True)
            ]

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint()

    def describe(self) -> dict[str, Any]:
        known = self.dataset.describe() if hasattr(self.dataset, "describe") else {"images": len(self.dataset)}
        return {**known, **self._sizes(), "images_per_epoch": self.images_per_epoch}
