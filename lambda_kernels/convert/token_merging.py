"""Which blocks of a model merge tokens, and how many: checked before the model changes."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..blocks.hooks import is_altered
from ..blocks.merging_block import MergingSequential, find_merging_obstacles
from ..blocks.refusals import qualified_name
from ..errors import UnsupportedModelError
from .settings import ConversionSettings


def plan_merging(model: nn.Module, removed: Sequence[int], settings: ConversionSettings) -> dict[int, int]:
    """How many tokens each block is to merge, by index; empty where no block merges any.

    `settings.tome_r` is that of each block that keeps its attention, from the `tome_start`-th on, or a value for each.

    Raises:
        ValueError: The numbers do not fit the blocks, or the model has fewer than two patches.
        UnsupportedModelError: A block, or what runs the blocks, would compute something else than without merging.
    """
    tome_r, tome_start = settings.tome_r, settings.tome_start
    if tome_r == 0 or (isinstance(tome_r, tuple) and not any(tome_r)):
        _check_exchange(model.blocks, MergingSequential, nn.Sequential)
        return {}
    remaining = [i for i in range(len(model.blocks)) if i not in removed]
    blocks = remaining[tome_start:]
    if not blocks:
        raise ValueError(
            f"tome_start={tome_start}, but only blocks that keep their attention merge tokens, and the model has "
            f"{len(remaining)} of them {remaining}, counted from 0"
        )
    values = (tome_r,) * len(blocks) if isinstance(tome_r, int) else tome_r
    if len(values) != len(blocks):
        raise ValueError(
            f"tome_r has {len(values)} values for {len(blocks)} blocks that merge tokens: {blocks}; pass one value for all "
            "of them, or one for each"
        )
    _check_model(model)
    for index in blocks:
        found = find_merging_obstacles(model.blocks[index])
        if found:
            raise UnsupportedModelError(f"blocks[{index}] cannot merge tokens: {'; '.join(found)}")
    return dict(zip(blocks, values, strict=True))


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"tokens of {name} cannot be merged: only in timm's VisionTransformer is it known which tokens are patches"
        )
    if getattr(model, "grad_checkpointing", False):
        raise UnsupportedModelError(
            f"tokens of this {name} cannot be merged: gradient checkpointing runs its blocks one by one, without the "
            "sizes of tokens. Call model.set_grad_checkpointing(False), and use recompute='all' to save memory"
        )
    _check_exchange(model.blocks, nn.Sequential, MergingSequential)
    patches = getattr(model.patch_embed, "num_patches", None)
    if patches is not None and patches < 2:
        raise ValueError(f"tome_r: this {name} has {patches} patch, and merging needs two")


def _check_exchange(container: nn.Module, old: type, new: type) -> None:
    """Refuse to replace an `old` container by a `new` one if something on it would be lost."""
    if type(container) is new:
        return
    if type(container) is not old:
        if new is nn.Sequential:  # nothing merges tokens, before or after
            return
        raise UnsupportedModelError(f"tokens cannot be merged: model.blocks is {qualified_name(container)}")
    if is_altered(container):
        raise UnsupportedModelError(
            "a hook or a replaced forward on model.blocks itself would be lost: remove it first"
        )
