"""Which blocks of a model merge tokens, and how many: checks before anything is changed, and the exchange of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..blocks.hooks import is_altered
from ..blocks.merging_block import MergingSequential, find_merging_obstacles
from ..blocks.refusals import qualified_name
from ..errors import UnsupportedModelError
from ..ops.checks import require_int

DEFAULT_START = 1


def resolve_tome_settings(model: nn.Module, tome_r: object, tome_start: object) -> tuple[int | tuple[int, ...], int]:
    """`tome_r` as an integer or a tuple of them, and `tome_start` as an integer; None is what `model` was converted with.

    Raises:
        ValueError: They are not integers, or negative.
    """
    info = getattr(model, "lambda_kernels_info", None)
    tome_r = getattr(info, "tome_r", 0) if tome_r is None else tome_r
    tome_start = getattr(info, "tome_start", DEFAULT_START) if tome_start is None else tome_start
    if isinstance(tome_r, Sequence) and not isinstance(tome_r, (str, bytes)):
        each = tuple(require_int(f"tome_r[{i}]", value, 0) for i, value in enumerate(tome_r))
        return each, require_int("tome_start", tome_start, 0)
    same = require_int("tome_r", tome_r, 0, more=" or a sequence of them, one for each block that merges")
    return same, require_int("tome_start", tome_start, 0)


def plan_merging(
    model: nn.Module, removed: Sequence[int], tome_r: int | tuple[int, ...], tome_start: int
) -> dict[int, int]:
    """How many tokens each block is to merge, by index; empty where nothing is merged.

    Args:
        model: That `inspect_model` has passed.
        removed: Blocks without attention.
        tome_r: Of every block that keeps its attention, from `tome_start` on; or one value for each of these blocks.
        tome_start: From which of the blocks that keep their attention on, counted from 0.

    Raises:
        ValueError: The numbers do not fit the blocks, or the model has no two patches to merge.
        UnsupportedModelError: A block, or what runs the blocks, would not compute what it does without merging.
    """
    remaining = [i for i in range(len(model.blocks)) if i not in removed]
    values = (tome_r,) if isinstance(tome_r, int) else tome_r
    if not any(values):
        _check_exchange(model.blocks, MergingSequential, nn.Sequential)
        return {}
    if not tome_start < len(remaining):
        raise ValueError(
            f"tome_start={tome_start}, but tokens are merged in blocks that keep their attention alone, and there are "
            f"{len(remaining)} of them {remaining}, counted from 0"
        )
    blocks = remaining[tome_start:]
    if not isinstance(tome_r, int) and len(tome_r) != len(blocks):
        raise ValueError(
            f"tome_r has {len(tome_r)} values for {len(blocks)} blocks that merge tokens: {blocks}; pass one value for all "
            "of them, or one for each"
        )
    _check_model(model)
    for index in blocks:
        found = find_merging_obstacles(model.blocks[index])
        if found:
            raise UnsupportedModelError(f"blocks[{index}] cannot merge tokens: {'; '.join(found)}")
    return dict(zip(blocks, values * len(blocks) if isinstance(tome_r, int) else tome_r, strict=True))


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"tokens of {name} cannot be merged: only of timm's VisionTransformer is it known which ones are patches"
        )
    if getattr(model, "grad_checkpointing", False):
        raise UnsupportedModelError(
            f"tokens of this {name} cannot be merged: gradient checkpointing runs its blocks one by one, where nothing hands "
            "on the sizes of tokens. Call model.set_grad_checkpointing(False), and use recompute='all' to save memory"
        )
    _check_exchange(model.blocks, nn.Sequential, MergingSequential)
    patches = getattr(model.patch_embed, "num_patches", None)
    if patches is not None and patches < 2:
        raise ValueError(f"tome_r: this {name} has {patches} patch, and merging takes two")


def _check_exchange(container: nn.Module, old: type, new: type) -> None:
    """Refuse to put a `new` in the place of an `old` that carries what would be lost."""
    if type(container) is new:
        return
    if type(container) is not old:
        if new is nn.Sequential:  # nothing merges, and nothing is to
            return
        raise UnsupportedModelError(f"tokens cannot be merged: model.blocks is {qualified_name(container)}")
    if is_altered(container):
        raise UnsupportedModelError(
            "a hook or a replaced forward on model.blocks itself would be lost: remove it first"
        )
