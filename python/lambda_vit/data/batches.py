"""Batches of images: tensors [N, C, H, W], or the padded patches of NaFlexVit; and how loaders give them.

A loader yields images, tuples that begin with images and labels, or dictionaries with `pixel_values` and `labels` as
Hugging Face's do; arrays of NumPy serve as tensors. Images are floating-point numbers, normalised as the model requires.

NaFlexVit (timm's `naflexvit`) reads images of any size as patches [N, T, P·P·C] with their coordinates and `patch_valid`
[N, T], which is False for padding. Tokens of padding belong to no image, so that no statistic may include them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lambda_kernels.ops.checks import dtype_name

from ..models.properties import image_channels

# A tensor, or the output of timm's NaFlexCollator: patches, patch_coord, patch_valid and a plain number.
Images = Tensor | dict[str, Any]


class SizedLoader(Protocol):
    """An iterable of batches with a length, such as a `DataLoader` over a dataset with a length."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def random_images(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed pixels [N, C, H, W], the same on every device and in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


class LoadedBatch(NamedTuple):
    """A batch of a loader, with at least one image."""

    number: int  # in its pass, from 0
    images: Images
    labels: Any  # as the loader gives them; None without

    def class_indices(self) -> Tensor:
        """The labels as int64 [N], from whole numbers [N] or [N, 1].

        Raises:
            ValueError: There are no labels, or they are not class indices.
        """
        if self.labels is None:
            raise ValueError(f"batch {self.number} has no labels: yield tuples (images, class indices)")
        images, labels = count(self.images), None
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # names or paths
            labels = torch.as_tensor(self.labels)
        if labels is not None:
            found = labels[:, 0] if labels.shape == (images, 1) else labels
            whole = not found.is_floating_point() or torch.equal(found, found.round())
            if found.shape == (images,) and whole and not found.is_complex():
                return found.long()
        got = type(self.labels).__name__ if labels is None else f"{dtype_name(labels.dtype)} {tuple(labels.shape)}"
        raise ValueError(
            f"labels of batch {self.number} are {got}: expected class indices [{images}], which are whole numbers. For one-hot "
            "labels or probabilities [N, classes], yield labels.argmax(1)"
        )


def read(loader: Iterable[Any], model: nn.Module | None = None) -> Iterator[LoadedBatch]:
    """The batches of one pass over `loader`, without empty ones.

    Raises:
        ValueError: A batch does not hold images as this module describes them, or as many channels as `model` takes.
    """
    for number, item in enumerate(loader):
        images, labels = _split(item, f"batch {number}")
        if isinstance(images, dict) or images.shape[:1] != (0,):
            check_images(images, model, f"batch {number}")
        if count(images):
            yield LoadedBatch(number, images, labels)


def check_images(images: Images, model: nn.Module | None, where: str) -> None:
    """Refuse images that `model` cannot take as they are; `where` names them.

    Raises:
        ValueError: They are integers, or not [N, C, H, W] with the model's channels.
    """
    pixels = images["patches"] if isinstance(images, dict) else images
    if not pixels.is_floating_point():
        raise ValueError(
            f"the images of {where} are {dtype_name(pixels.dtype)}: expected floating-point numbers, normalised by the model's "
            "mean and std. Scale them to 0…1 and normalise them, with timm.data.create_transform or torchvision's ToDtype("
            "torch.float32, scale=True) and Normalize"
        )
    channels = None if model is None else image_channels(model)
    if isinstance(images, dict):
        if channels is not None:
            raise ValueError(
                f"{where} holds patches, which {type(model).__name__} cannot take: yield [N, {channels}, H, W]"
            )
        return
    shape = tuple(images.shape)
    if len(shape) != 4 or channels not in (None, shape[1]):
        remedy = ""
        if len(shape) == 4 and shape[3] == channels:
            remedy = ". They have their channels last: use images.permute(0, 3, 1, 2)"
        raise ValueError(f"the images of {where} have shape {shape}: expected [N, {channels or 'C'}, H, W]{remedy}")


def check_range(labels: Tensor, classes: int, number: int) -> None:
    """Refuse class indices [N] of batch `number` outside 0…`classes` − 1.

    Raises:
        ValueError: There are some; the message names the lowest and the highest.
    """
    low, high = (int(end) for end in labels.aminmax())
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"batch {number} has labels {low}…{high} and the model {classes} outputs: open the data with "
            f"num_classes={classes}, or use a model made for these classes"
        )


def check_repeatable(name: str, loader: Iterable[Any]) -> None:
    """Refuse a loader that can be iterated only once.

    Raises:
        ValueError: `loader`, which messages call `name`, is an iterator.
    """
    if isinstance(loader, Iterator):
        raise ValueError(f"{name} must be iterable more than once (a DataLoader or a list); got an iterator")


def images_of(item: Any) -> Images:
    """The images of a batch as a loader yields it."""
    return _split(item, "a batch")[0]


def _split(item: Any, where: str) -> tuple[Images, Any]:
    """The images and the labels of a batch; None for labels that are not there."""
    images, labels = item, None
    if isinstance(item, (tuple, list)) and item:
        images, labels = item[0], item[1] if len(item) > 1 else None
    if isinstance(images, Mapping):
        if "patches" in images:
            return dict(images), labels
        if "pixel_values" not in images:
            raise ValueError(
                f"{where} is a dictionary with the keys {', '.join(map(str, images))}: expected pixel_values and labels, or "
                "the patches of NaFlexVit. Rename the keys, or yield tuples (images, labels)"
            )
        if labels is None:
            labels = images.get("labels", images.get("label"))
        images = images["pixel_values"]
    images, labels = (
        torch.as_tensor(part) if isinstance(part, np.ndarray) and np.issubdtype(part.dtype, np.number) else part
        for part in (images, labels)
    )
    if not isinstance(images, Tensor):
        raise ValueError(f"{where} holds images as {type(images).__name__}: expected a tensor [N, C, H, W]")
    return images, labels


def count(images: Images) -> int:
    """Number of images."""
    return len(images["patches"] if isinstance(images, dict) else images)


def mapped(images: Images, function: Callable[[Tensor], Tensor]) -> Images:
    """Apply `function` to each tensor; other values stay unchanged."""
    if isinstance(images, dict):
        return {name: function(value) if isinstance(value, Tensor) else value for name, value in images.items()}
    return function(images)


def first(images: Images, number: int) -> Images:
    """The first `number` of the images."""
    return mapped(images, lambda tensor: tensor[:number])


def to(images: Images, device: torch.device, dtype: torch.dtype) -> Images:
    """Move images to `device` and their pixels to `dtype`; coordinates and masks keep their dtype."""
    if isinstance(images, dict):
        own = {"patches": dtype}
        return {
            name: value.to(device, own.get(name), non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in images.items()
        }
    return images.to(device, dtype, non_blocking=True)


def tensors(images: Images | None) -> dict[str, Tensor]:
    """All tensors by name; empty for None."""
    if images is None:
        return {}
    if isinstance(images, dict):
        return {name: value for name, value in images.items() if isinstance(value, Tensor)}
    return {"pixels": images}


def from_tensors(held: dict[str, Tensor]) -> Images | None:
    """The inverse of `tensors`."""
    return held.get("pixels", held) if held else None


def finite(images: Images) -> bool:
    """Whether the pixels hold no NaN and no infinity."""
    return bool(torch.isfinite(images["patches"] if isinstance(images, dict) else images).all())


def valid_tokens(model: nn.Module, images: Images | None) -> Tensor | None:
    """bool [N, T]: the tokens between the blocks of `model` that are not padding; None if there is no padding."""
    valid = images.get("patch_valid") if isinstance(images, dict) else None
    if valid is None:
        return None
    prefix = valid.new_ones((len(valid), getattr(model, "num_prefix_tokens", 0)), dtype=torch.bool)
    return torch.cat([prefix, valid.bool()], dim=1)


def features(model: nn.Module, images: Images) -> Any:
    """The input of the head: tokens [N, T, C], or for patches a dictionary of them and their mask."""
    if not isinstance(images, dict):
        return model.forward_features(images)
    return model.forward_features(images["patches"], images["patch_coord"], images["patch_valid"])


def head(model: nn.Module, features: Any, pre_logits: bool = False) -> Tensor:
    """Apply the model's head to the output of `features`."""
    if isinstance(features, dict):
        return model.forward_head(**features, pre_logits=pre_logits)
    return model.forward_head(features, pre_logits=pre_logits)
