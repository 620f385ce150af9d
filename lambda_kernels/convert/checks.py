"""Checks of a requested conversion, before the model changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks.families import get_layer_scale
from ..blocks.mlp_block import find_family
from ..blocks.structure import ViTStructure
from ..errors import UnsupportedModelError
from ..ops.checks import as_int

# Below this mean, LayerScale makes the MLP branch negligible beside a doubled residual.
SMALL_GAMMA = 0.05


def unwrap_layers(layers: Any) -> Any:
    """The block indices of a `Selection`; anything else as it is."""
    return getattr(layers, "layers", layers)


def check_indices(layers: object, depth: int, name: str = "remove") -> tuple[int, ...]:
    """Return the block indices of `layers`, or of its attribute `layers` as a `Selection` has, sorted.

    ValueError names the argument, a wrong index and the allowed range.
    """
    layers = unwrap_layers(layers)
    allowed = f"block indices are integers from 0 to {depth - 1}"
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise ValueError(f"{name} must be a sequence of block indices; got {layers!r}. {allowed}")
    checked: list[int] = []
    for value in layers:
        index = as_int(value)
        if index is None or not 0 <= index < depth:
            raise ValueError(f"{name} holds {value!r}, but {allowed}")
        if index in checked:
            raise ValueError(f"{name} holds {index} twice")
        checked.append(index)
    return tuple(sorted(checked))


def check_removal(
    model: nn.Module, removed: tuple[int, ...], structure: ViTStructure, residual_scale: float, *, stacklevel: int = 3
) -> None:
    """Refuse removals after which the model could not work; warn, with `stacklevel`, about those that look wrong."""
    if structure.pooling == "token" and len(removed) == structure.depth:
        raise ValueError(
            f"removing the attention of all {structure.depth} blocks cuts the class token off from the image: every image "
            "would get the same logits. Retain the attention of at least one block"
        )
    trailing = 0
    while trailing < len(removed) and structure.depth - 1 - trailing in removed:
        trailing += 1
    if structure.pooling == "token" and trailing:
        warnings.warn(
            f"the last {trailing} block(s) would have no attention, so nothing that they compute for the image's patches "
            "reaches the class token",
            stacklevel=stacklevel,
        )
    if residual_scale == 1.0 or not removed:
        return
    if not structure.has_final_norm:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm after its last block, so its features would grow "
            f"{residual_scale ** len(removed):g}-fold with residual_scale={residual_scale:g}. Use residual_scale=1.0"
        )
    if residual_scale > 1.0 and get_device_and_dtype(model)[1] is torch.float16:
        warnings.warn(
            f"the model is in float16, which ends at 65504, and residual_scale={residual_scale:g} makes its features up to "
            f"{residual_scale ** len(removed):g} times larger. Use bfloat16 or float32 instead, or compare the model's output "
            "with that in float32",
            stacklevel=stacklevel,
        )
    small = []
    for index in removed:
        family = find_family(model.blocks[index])
        gamma = None if family is None else get_layer_scale(model.blocks[index], family.scales[1])
        if gamma is not None and not gamma.is_meta and gamma.detach().abs().mean() < SMALL_GAMMA:
            small.append(index)
    if small:
        warnings.warn(
            f"blocks {small} have LayerScale gammas below {SMALL_GAMMA} on average: a residual scaled by "
            f"{residual_scale:g} dwarfs their MLP branch. That is right only if the model was trained so",
            stacklevel=stacklevel,
        )


def get_device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters(), torch.empty(0))
    return weight.device, weight.dtype
