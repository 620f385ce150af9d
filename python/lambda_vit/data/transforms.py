"""How a model expects its images to be prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..models.properties import input_shape


def transforms_for(model: nn.Module, training: bool = False, **augment: Any) -> Callable[..., Tensor]:
    """timm's transform for a model: its mean, std, interpolation and crop, at the size the model was built for.

    Args:
        model: A timm model with 1 or 3 input channels; with 1, images are turned to grey.
        training: Random crops and flips, and whatever `augment` adds.
        **augment: Further arguments of `timm.data.create_transform`, such as `auto_augment` or `re_prob`.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Grayscale

    config = data_config(model)
    size = config["input_size"]
    transform = create_transform(**{**config, "is_training": training, **augment})
    return Compose([Grayscale(), transform]) if size[0] == 1 else transform


def data_config(model: nn.Module) -> dict[str, Any]:
    """What timm says of how images are prepared for a model: input_size, mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        ValueError: The model takes neither grey nor colour images.
    """
    from timm.data import resolve_model_data_config

    size = input_shape(model)
    if size[0] not in (1, 3):
        raise ValueError(f"the model takes {size[0]} channels, images have 1 or 3: pass a transform of your own")
    config = resolve_model_data_config(model, args={"input_size": size})
    if size[0] == 1:
        config |= {key: (float(np.mean(config[key])),) for key in ("mean", "std")}
    return config
