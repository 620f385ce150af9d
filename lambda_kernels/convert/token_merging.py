"""Which blocks of a model merge tokens, and how many: checks before anything is changed, and the exchange of blocks."""

from __future__ import annotations

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from .blocks import FusedMlp, replacement_obstacles
from .errors import UnsupportedModelError
from .families import qualified_name
from .hooks import is_altered
from .merging_block import MergingBlock, MergingSequential
from .ops.merging import mergeable

# What timm's Attention is made of in the versions that are known; another part would do something that is not done here.
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}
_OPTIONAL_PARTS = {"norm", "gate"}
_KNOWN_ARGUMENTS = {"self", "x", "attn_mask", "is_causal"}
_UNKNOWN_ARGUMENTS = sorted(set(inspect.signature(Attention.forward).parameters) - _KNOWN_ARGUMENTS)


DEFAULT_START = 1


def settings_for(model: nn.Module, tome_r: object, tome_start: object) -> tuple[int | tuple[int, ...], int]:
    """`tome_r` as an integer or a tuple of them, and `tome_start` as an integer; None is what `model` was converted with.

    Raises:
        ValueError: They are no whole numbers, or negative.
    """
    info = getattr(model, "lambda_kernels_info", None)
    tome_r = getattr(info, "tome_r", 0) if tome_r is None else tome_r
    tome_start = getattr(info, "tome_start", DEFAULT_START) if tome_start is None else tome_start
    if isinstance(tome_r, Sequence) and not isinstance(tome_r, (str, bytes)):
        each = tuple(_whole(f"tome_r[{i}]", value) for i, value in enumerate(tome_r))
        return each, _whole("tome_start", tome_start)
    same = _whole("tome_r", tome_r, " or a sequence of them, one for each block that merges")
    return same, _whole("tome_start", tome_start)


def _whole(name: str, value: Any, more: str = "") -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 0:
        raise ValueError(f"{name} must be a whole number of at least 0{more}; got {value!r}")
    return number


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
        found = merging_obstacles(model.blocks[index])
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


def merging_obstacles(block: nn.Module) -> list[str]:
    """Why `block` cannot merge tokens; empty when it can."""
    if type(block) not in (Block, FusedMlp, MergingBlock):
        return [f"it is {qualified_name(block)}, and merging knows timm.models.vision_transformer.Block alone"]
    found = [] if type(block) is MergingBlock else replacement_obstacles(block)
    attn = block._modules.get("attn")
    if type(attn) is not Attention:
        return [*found, f"its attention is {qualified_name(attn)}, whose keys are not known"]
    if _UNKNOWN_ARGUMENTS:
        found.append(f"the attention of this version of timm takes {', '.join(_UNKNOWN_ARGUMENTS)}")
    parts = set(attn._modules)
    if not _ATTENTION_PARTS <= parts <= _ATTENTION_PARTS | _OPTIONAL_PARTS:
        names = ", ".join(sorted((parts ^ _ATTENTION_PARTS) - _OPTIONAL_PARTS))
        found.append(f"its attention has other parts than timm's ({names})")
    if is_altered(attn):
        found.append("a hook or a replaced forward on its attention would not run")
    return found


def merging(
    block: nn.Module, tome_r: int, prefix_tokens: int, fuse: bool, backend: str, recompute: str
) -> MergingBlock:
    """`block` as one that merges tokens; itself where it is that already. `block` is left as it is."""
    if type(block) is not MergingBlock:
        options = {"fuse": fuse, "backend": backend, "recompute": recompute}
        return MergingBlock.from_block(block, tome_r=tome_r, prefix_tokens=prefix_tokens, **options)
    asked = {"tome_r": tome_r, "prefix_tokens": prefix_tokens, "fuse": fuse, "backend": backend, "recompute": recompute}
    if all(getattr(block, name) == value for name, value in asked.items()):
        return block
    twin = copy.copy(block)  # shares submodules and hooks, so that handles of these stay good
    for name, value in asked.items():
        setattr(twin, name, value)
    return twin


def without_merging(block: nn.Module) -> nn.Module:
    """`block` as one that does not merge: itself, or a `FusedMlp` around the submodules of a `MergingBlock`.

    Raises:
        UnsupportedModelError: It carries hooks or anything else that would be lost.
    """
    if type(block) is not MergingBlock:
        return block
    found = replacement_obstacles(block)
    if found:
        raise UnsupportedModelError(f"a block that merges tokens cannot be put back: {'; '.join(found)}")
    return FusedMlp.from_block(block)


def arranged(blocks: nn.Sequential | nn.ModuleList, merges: bool) -> nn.Sequential | nn.ModuleList:
    """The sequence of blocks as one that hands on the sizes of tokens, or as a plain one; itself where it is that already."""
    if merges == (type(blocks) is MergingSequential):
        return blocks
    new = (MergingSequential if merges else nn.Sequential)(OrderedDict(blocks.named_children()))
    new.training = blocks.training
    return new


def token_counts(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[int, int]] | None:
    """(tokens that go in, tokens merged) of each block, for images of the size that the model was built for.

    None where nothing is merged, or where the model does not say how many patches it has.
    """
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None or not any(type(block) is MergingBlock for block in blocks):
        return None
    counts, tokens = [], patches + model.num_prefix_tokens
    for block in blocks:
        merged = mergeable(tokens, block.tome_r, block.prefix_tokens) if type(block) is MergingBlock else 0
        counts.append((tokens, merged))
        tokens -= merged
    return counts
