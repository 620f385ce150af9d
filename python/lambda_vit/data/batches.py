"""What a loader gives as images: a tensor [N, C, H, W], or the patches of NaFlexVit, where short images are padded.

NaFlexVit (timm's `naflexvit`) takes images of any size as patches [N, T, P·P·C] with their coordinates, and `patch_valid`
[N, T], which is False where there is only padding. Tokens of padding belong to no image, so no statistic may hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A tensor, or what timm's NaFlexCollator makes of images: patches, patch_coord, patch_valid and a plain number.
Images = Tensor | dict[str, Any]


class SizedLoader(Protocol):
    """What yields batches and knows how many, as a `DataLoader` over a dataset with a length does."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def random_images(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed pixels [N, C, H, W], the same on every device and in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def images_of(item: Any) -> Images:
    """The images in what a loader gave: alone, or first in a tuple."""
    return item[0] if isinstance(item, (tuple, list)) else item


def count(images: Images) -> int:
    """How many images there are."""
    return len(images["patches"] if isinstance(images, dict) else images)


def mapped(images: Images, function: Callable[[Tensor], Tensor]) -> Images:
    """`function` of each tensor; what is no tensor stays."""
    if isinstance(images, dict):
        return {name: function(value) if isinstance(value, Tensor) else value for name, value in images.items()}
    return function(images)


def first(images: Images, number: int) -> Images:
    """The first `number` of the images."""
    return mapped(images, lambda tensor: tensor[:number])


def to(images: Images, device: torch.device, dtype: torch.dtype) -> Images:
    """The images on `device`; pixels with `dtype`, coordinates and what is valid with their own."""
    if isinstance(images, dict):
        own = {"patches": dtype}
        return {
            name: value.to(device, own.get(name), non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in images.items()
        }
    return images.to(device, dtype, non_blocking=True)


def tensors(images: Images | None) -> dict[str, Tensor]:
    """All tensors by name; none of None."""
    if images is None:
        return {}
    if isinstance(images, dict):
        return {name: value for name, value in images.items() if isinstance(value, Tensor)}
    return {"pixels": images}


def from_tensors(held: dict[str, Tensor]) -> Images | None:
    """What `tensors` took apart; None for nothing."""
    return held.get("pixels", held) if held else None


def finite(images: Images) -> bool:
    """Whether the pixels hold no NaN and no infinity."""
    return bool(torch.isfinite(images["patches"] if isinstance(images, dict) else images).all())


def valid_tokens(model: nn.Module, images: Images | None) -> Tensor | None:
    """bool [N, T]: which tokens between the blocks of `model` belong to an image or are prefix tokens; None: all do."""
    valid = images.get("patch_valid") if isinstance(images, dict) else None
    if valid is None:
        return None
    prefix = valid.new_ones((len(valid), getattr(model, "num_prefix_tokens", 0)), dtype=torch.bool)
    return torch.cat([prefix, valid.bool()], dim=1)


def features(model: nn.Module, images: Images) -> Any:
    """What goes into the head: tokens [N, T, C], or for patches a dictionary of them and of what is valid."""
    if not isinstance(images, dict):
        return model.forward_features(images)
    return model.forward_features(images["patches"], images["patch_coord"], images["patch_valid"])


def head(model: nn.Module, features: Any, pre_logits: bool = False) -> Tensor:
    """The model's own head over what `features` gave."""
    if isinstance(features, dict):
        return model.forward_head(**features, pre_logits=pre_logits)
    return model.forward_head(features, pre_logits=pre_logits)
