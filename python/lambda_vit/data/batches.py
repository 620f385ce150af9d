"""Batches of images: tensors [N, C, H, W], or the padded patches of NaFlexVit.

NaFlexVit (timm's `naflexvit`) reads images of any size as patches [N, T, P·P·C] with their coordinates and `patch_valid`
[N, T], which is False for padding. Tokens of padding belong to no image, so that no statistic may include them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A tensor, or the output of timm's NaFlexCollator: patches, patch_coord, patch_valid and a plain number.
Images = Tensor | dict[str, Any]


class SizedLoader(Protocol):
    """An iterable of batches with a length, such as a `DataLoader` over a dataset with a length."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def random_images(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed pixels [N, C, H, W], the same on every device and in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def images_of(item: Any) -> Images:
    """The images of a batch, which are the batch itself or its first item."""
    return item[0] if isinstance(item, (tuple, list)) else item


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
