"""What a recipe changes about a model before it is trained: input size, stochastic depth, dropout, frozen stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...models.properties import input_shape
from ..recipe import Recipe

# timm's names of what comes before the blocks.
EMBEDDING = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")


def prepare_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Give `model`, in place, the input size, validation crop, stochastic depth and dropout that the recipe asks for.

    To be called before the data are opened, whose images have the model's input size. Doing it again changes nothing.

    Raises:
        ValueError: The model cannot take another input size, or has no such dropout.
    """
    if recipe.img_size is not None and input_shape(model)[1:] != (recipe.img_size,) * 2:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"img_size={recipe.img_size}: {type(model).__name__} keeps the input size it was built for"
            )
        model.set_input_size(img_size=(recipe.img_size,) * 2)
    if recipe.crop_pct is not None:  # kept with the model: whoever loads it has to crop as it was measured
        model.pretrained_cfg = {**(model.pretrained_cfg or {}), "crop_pct": recipe.crop_pct}  # type: ignore[assignment]  # as timm does
    if recipe.drop_path is not None:
        _set_drop_path(model, recipe.drop_path)
    if recipe.drop is not None:
        if not isinstance(getattr(model, "head_drop", None), nn.Dropout):
            raise ValueError(f"drop={recipe.drop:g}: {type(model).__name__} has no dropout before its classifier")
        model.head_drop.p = recipe.drop
    return model


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """As timm builds it: from 0 in the first block to `rate` in the last."""
    from timm.layers import DropPath

    last = max(1, len(model.blocks) - 1)
    for index, block in enumerate(model.blocks):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                own = rate * index / last if len(model.blocks) > 1 else 0.0
                setattr(block, name, DropPath(own) if own else nn.Identity())


def frozen_parts(model: nn.Module, stages: Sequence[str | int]) -> list[nn.Module | nn.Parameter]:
    """The modules and parameters of `stages`: "embed" is all before the blocks, a number is a block.

    Raises:
        ValueError: A block that there is not.
    """
    parts: list[nn.Module | nn.Parameter] = []
    for stage in stages:
        if stage == "embed":
            found = (getattr(model, name, None) for name in EMBEDDING)
            parts += [part for part in found if isinstance(part, (nn.Module, nn.Parameter))]
        elif isinstance(stage, int) and stage < len(model.blocks):
            parts.append(model.blocks[stage])
        else:
            raise ValueError(f"freeze holds {stage}: block indices are integers from 0 to {len(model.blocks) - 1}")
    return parts


def set_training_mode(model: nn.Module, stages: Sequence[str | int]) -> None:
    """Training mode for all but the frozen stages, whose dropout and stochastic depth would only add noise."""
    model.train()
    for part in frozen_parts(model, stages):
        if isinstance(part, nn.Module):
            part.eval()
