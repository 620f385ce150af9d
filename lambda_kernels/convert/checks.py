"""Checks of what a conversion is asked to do, before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks.families import layer_scale
from ..blocks.mlp_block import find_family
from ..blocks.structure import ViTStructure
from ..errors import UnsupportedModelError
from ..ops.checks import as_int

# Below this, LayerScale makes the MLP branch so small that a doubled residual drowns it.
SMALL_GAMMA = 0.05


def unwrap_layers(layers: Any) -> Any:
    """The block indices of a `Selection`; anything else as it is."""
    return getattr(layers, "layers", layers)


def check_indices(layers: object, depth: int, name: str = "remove") -> tuple[int, ...]:
    """Return block indices, sorted, or raise ValueError naming the wrong one and the range.

    Args:
        layers: Integers, or any object with a `layers` attribute that holds them (a `Selection`).
        depth: Number of blocks.
        name: The argument's name for the message.
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
    """Refuse removals that would leave a model that cannot work; warn about those that look wrong.

    `stacklevel` is that of `warnings.warn`, counted from within.

    Raises:
        ValueError: A class token would be cut off from the image.
        UnsupportedModelError: No norm would absorb a residual scaled in every removed block.
    """
    if structure.pooling == "token" and len(removed) == structure.depth:
        raise ValueError(
            f"removing the attention of all {structure.depth} blocks cuts the class token off from the image: every image "
            "would get the same logits. Keep at least one"
        )
    trailing = 0
    while trailing < len(removed) and structure.depth - 1 - trailing in removed:
        trailing += 1
    if structure.pooling == "token" and trailing:
        warnings.warn(
            f"the last {trailing} block(s) would have no attention: nothing computed there for the image's patches reaches "
            "the class token, only its own MLP acts",
            stacklevel=stacklevel,
        )
    if residual_scale == 1.0 or not removed:
        return
    if not structure.has_final_norm:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm after its last block, so its features would grow "
            f"{residual_scale ** len(removed):g}-fold with residual_scale={residual_scale:g}. Use residual_scale=1.0"
        )
    if residual_scale > 1.0 and _place(model)[1] is torch.float16:
        warnings.warn(
            f"the model is in float16, which ends at 65504, and residual_scale={residual_scale:g} makes its features up to "
            f"{residual_scale ** len(removed):g} times larger. Use bfloat16 or float32 instead, or compare the model's output "
            "with that in float32",
            stacklevel=stacklevel,
        )
    small = []
    for index in removed:
        family = find_family(model.blocks[index])
        gamma = None if family is None else layer_scale(model.blocks[index], family.scales[1])
        if gamma is not None and not gamma.is_meta and gamma.detach().abs().mean() < SMALL_GAMMA:
            small.append(index)
    if small:
        warnings.warn(
            f"blocks {small} have LayerScale gammas below {SMALL_GAMMA} on average: a residual scaled by "
            f"{residual_scale:g} dwarfs their MLP. Only right if the model was trained that way",
            stacklevel=stacklevel,
        )


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters(), torch.empty(0))
    return weight.device, weight.dtype
