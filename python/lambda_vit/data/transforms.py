"""How a model expects its images to be prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..models.properties import input_shape
from ..runtime.formatting import format_differences


def transforms_for(model: nn.Module, training: bool = False, **augment: Any) -> Callable[..., Tensor]:
    """timm's transform for a model: its mean, std, interpolation and crop, at the size that the model was built for.

    Args:
        model: A timm model with 1 or 3 input channels; with 1, images are converted to greyscale.
        training: Use random crops and flips, and the augmentations of `augment`.
        **augment: Further arguments of `timm.data.create_transform`, such as `auto_augment` or `re_prob`.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Grayscale

    config = data_config(model)
    size = config["input_size"]
    transform = create_transform(**{**config, "is_training": training, **augment})
    return Compose([Grayscale(), transform]) if size[0] == 1 else transform


def _resolve(model: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    return resolve_model_data_config(model, args={"input_size": input_shape(model)})


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preparation of images for a model: input_size, mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        ValueError: The model takes neither grey nor colour images.
    """
    config = _resolve(model)
    size = config["input_size"]
    if size[0] not in (1, 3):
        raise ValueError(f"the model takes {size[0]} channels, images have 1 or 3: pass a transform of your own")
    if size[0] == 1:
        config |= {key: (float(np.mean(config[key])),) for key in ("mean", "std")}
    return config


def check_preparation(models: Mapping[str, nn.Module], remedy: str) -> None:
    """Refuse models, by name, that expect differently prepared images.

    Raises:
        ValueError: Preparations differ; the message names the differences and `remedy`.
    """
    wanted = {}
    for name, model in models.items():
        wanted[name] = {key: tuple(v) if isinstance(v, list) else v for key, v in _resolve(model).items()}
    first, *others = wanted
    for other in others:
        if listed := format_differences(wanted[first], wanted[other], "{} {} and {}"):
            raise ValueError(
                f"{first} and {other} want their images prepared differently ({listed}): they cannot be compared on one "
                f"data set. {remedy}"
            )


def set_crop(models: Iterable[nn.Module], crop_pct: float) -> None:
    """Set the share of the shorter side that timm crops for these models, whatever their own configs say."""
    for model in models:
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "crop_pct": crop_pct}  # type: ignore[assignment]


def check_crop(crop_pct: float | None) -> None:
    """Check a share of the shorter side of an image.

    Raises:
        ValueError: `crop_pct` is not above 0 and at most 1.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, such as 0.9; got {crop_pct:g}")
