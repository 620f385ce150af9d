"""The handwritten digits of scikit-learn as a set of images that needs no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .fingerprints import describe_dataset


class Digits(TensorDataset):
    """Handwritten digits as `tensors = (images [N, 1, H, W], labels [N])`; made by `digits`."""

    def __init__(self, images: Tensor, labels: Tensor, split: str) -> None:
        super().__init__(images, labels)
        self.split = split
        self.classes = [str(digit) for digit in range(10)]
        self.num_classes = 10

    @property
    def targets(self) -> list[int]:
        return self.tensors[1].tolist()

    def select(self, indices: Iterable[int]) -> Digits:
        keep = torch.tensor(list(indices), dtype=torch.long)
        return Digits(self.tensors[0][keep], self.tensors[1][keep], self.split)

    def fingerprint(self) -> str:
        """SHA-256 over the images and labels."""
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in self.tensors)).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The description of the data for a report."""
        return describe_dataset(self, "scikit-learn digits")


def digits(split: str, image_size: int | None = None) -> Digits:
    """The 1,797 digits of scikit-learn in one fixed stratified split; nothing is downloaded.

    Args:
        split: "train" (1,437 images) or "val" (360).
        image_size: Side in pixels after resizing; None keeps 8.

    Returns:
        Float images [N, 1, S, S], normalised so that the train split has mean 0 and standard deviation 1.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: the digits have 'train' and 'val'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: expected at least 1 pixel")
    pixels, labels = load_digits(return_X_y=True)
    train, val = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    if image_size is not None:
        images = nn.functional.interpolate(images, size=(image_size, image_size), mode="bicubic", antialias=True)
    images = (images - images[train].mean()) / images[train].std()
    chosen = train if split == "train" else val
    return Digits(images[chosen], torch.from_numpy(labels).long()[chosen], split)
