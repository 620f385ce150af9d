"""Image sets and streams for the tests of training data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_models import small_vit

from lambda_vit.data.images import open_images
from lambda_vit.training.images.opening import training_transform
from lambda_vit.training.images.stream import DatasetStream, TrainingStream
from lambda_vit.training.recipe import Recipe

# Steps of eight images in four micro-batches of two.
SMALL = {"epochs": 4, "lr": 1e-3, "batch_size": 8, "micro_batch": 2}


def picture(seed: int, size: int = 20) -> bytes:
    """A JPEG of random blocks, each seed another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def image_set(train: int = 40, val: int = 6, classes: str = "ab") -> dict[str, bytes]:
    """Files by path: `train` and `val` images in all, over the classes in turn."""
    files = {}
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for i in range(count):
            files[f"{split}/{classes[i % len(classes)]}/{i:03d}.jpg"] = picture(first + i)
    return files


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def stream_of(root: Path, *, shard: tuple[int, int] = (0, 1), workers: int = 0, skip_bad: int = 0, **knobs: object):
    """A stream of the train split of a set of two classes, augmented as the recipe's defaults say."""
    recipe = Recipe(**{**SMALL, **knobs})
    transform = training_transform(small_vit(num_classes=2), recipe)
    dataset = open_images(root, "train", transform=transform)
    return DatasetStream(dataset, recipe, shard=shard, workers=workers, skip_bad=skip_bad)


def collected(
    stream: TrainingStream, epoch: int = 0, start: int = 0, steps: int | None = None
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """(images, targets) by step and number of the micro-batch."""
    found = {}
    for step, parts in enumerate(stream.steps(epoch, start), start):
        found.update({(step, part.number): (part.images, part.targets) for part in parts})
        if steps is not None and step + 1 == steps:
            break
    return found


def assert_same(found: Mapping, expected: Mapping) -> None:
    """Every micro-batch found is the one expected, bit for bit; and there are some."""
    assert found
    for key, (images, targets) in found.items():
        assert torch.equal(images, expected[key][0]), key
        assert torch.equal(targets, expected[key][1]), key


def make_images(root: Path) -> Path:
    """Ten classes of noise, distinguishable by brightness, as train/<class>/* and val/<class>/*."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for label in range(10):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (40, 36, 3)) + 19 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return root
