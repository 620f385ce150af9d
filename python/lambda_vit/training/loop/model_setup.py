"""Changes to a model before it is trained: input size, stochastic depth, dropout, classifier, frozen stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...models.properties import input_shape, one_device, set_class_names
from ...runtime.seeding import mixed_seed, preserved, seed_all
from ..recipe import Recipe

# timm's names of the modules and parameters in front of the blocks.
EMBEDDING = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")


def prepare_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Set, in place, the input size, validation crop, stochastic depth and dropout of `model` as the recipe says.

    The data must be opened afterwards, since their images get the model's input size. A second call changes nothing.

    Raises:
        ValueError: The model cannot change its input size, or has no such dropout.
    """
    if recipe.img_size is not None and input_shape(model)[1:] != (recipe.img_size,) * 2:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"img_size={recipe.img_size}: {type(model).__name__} cannot change the input size it was built for"
            )
        model.set_input_size(img_size=(recipe.img_size,) * 2)
    if recipe.crop_pct is not None:  # saved with the model, which has to be used with the crop it was measured with
        model.pretrained_cfg = {**(model.pretrained_cfg or {}), "crop_pct": recipe.crop_pct}  # type: ignore[assignment]  # as timm does
    if recipe.drop_path is not None:
        _set_drop_path(model, recipe.drop_path)
    if recipe.drop is not None:
        if not isinstance(getattr(model, "head_drop", None), nn.Dropout):
            raise ValueError(f"drop={recipe.drop:g}: {type(model).__name__} has no dropout before its classifier")
        model.head_drop.p = recipe.drop
    return model


def replace_classifier(model: nn.Module, num_classes: int, seed: int) -> None:
    """Give `model` a new classifier, the same in every process and after every interruption: it follows from the seed."""
    device = one_device(model)
    with preserved():
        seed_all(mixed_seed("classifier", seed))
        model.reset_classifier(num_classes)
    set_class_names(model, None)
    model.to(device)


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
    """The modules and parameters of `stages`: "embed" is everything in front of the blocks, a number is a block.

    Raises:
        ValueError: The model has no such block.
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
    """Set training mode, except in frozen stages, where dropout and stochastic depth would only add noise."""
    model.train()
    for part in frozen_parts(model, stages):
        if isinstance(part, nn.Module):
            part.eval()
