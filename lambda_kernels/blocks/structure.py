"""The structure of a model: whether its blocks are supported, what was removed, and what runs before them."""

from __future__ import annotations

from dataclasses import dataclass

from timm.models import beit, eva
from torch import nn

from ..errors import UnsupportedModelError
from .families import FAMILIES
from .mlp_block import find_family
from .refusals import NO_BLOCKS, SUBCLASS, UNKNOWN_BLOCK, find_refusal, qualified_name

_FEATURES = "convert the whole model first, then wrap it: lambda_kernels.features.feature_model(converted, out_indices)"


@dataclass(frozen=True)
class Stem:
    """What a model does before its blocks, and how a view of it that receives tokens instead of images skips that."""

    identities: tuple[str, ...]  # submodules to replace by identities
    absent: tuple[str, ...] = ()  # attributes to set to None
    no_tokens: tuple[str, ...] = ()  # prefix tokens [1, n, C] to omit
    pos_embed: tuple[None, ...] | None = ()  # what `_pos_embed` returns besides tokens; None: there is no such method


_VIT_STEM = Stem(("patch_embed", "patch_drop", "norm_pre"))

_STEMS: dict[type[nn.Module], Stem] = {
    eva.Eva: Stem(("patch_embed", "norm_pre"), pos_embed=(None,)),
    beit.Beit: Stem(("patch_embed",), ("pos_embed", "rel_pos_bias"), ("cls_token",), None),
}


def find_stem(model: nn.Module) -> Stem:
    """How to skip what `model` does before its blocks; for models of unknown classes, as for a ViT."""
    return next((_STEMS[cls] for cls in type(model).__mro__ if cls in _STEMS), _VIT_STEM)


@dataclass(frozen=True)
class ViTStructure:
    """The properties of a supported model that conversions depend on.

    Blocks with attention are treated alike, whether they are timm's own or `FusedMlp`.
    """

    depth: int
    removed: tuple[int, ...]
    residual_scale: float  # of the blocks without attention; 1 if there are none
    pooling: str  # timm's global_pool: "token", "avg", "map" …
    has_final_norm: bool  # a norm between the last block and the classifier absorbs the scale of the residual
    families: tuple[str, ...] = ("vit",)  # of the blocks, each once, in their order
    merging: tuple[int, ...] = ()  # blocks that merge tokens


def inspect_model(model: nn.Module) -> ViTStructure:
    """Describe `model`, or refuse it.

    Raises:
        UnsupportedModelError: The model is wrapped, has no `blocks`, or the attention of its blocks cannot be removed
            alone. The message names the class, the reason and an alternative. The model never changes.
    """
    from .attention_free import AttentionFreeBlock
    from .fused_mlp import FusedMlp
    from .merging_block import MergingBlock

    _refuse_wrappers(model)
    blocks = getattr(model, "blocks", None)
    name = type(model).__name__
    refusal = find_refusal(model)
    if refusal is None and (not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0):
        refusal = NO_BLOCKS
    if refusal is not None:
        raise UnsupportedModelError(f"{name} is not supported: {refusal.reason}. {refusal.instead}")
    known = {family.block for family in FAMILIES.values()} | {FusedMlp, MergingBlock, AttentionFreeBlock}
    strangers = {i: block for i, block in enumerate(blocks) if type(block) not in known}
    if strangers:
        index, stranger = next(iter(strangers.items()))
        refusal = find_refusal(stranger)
        if refusal is None:
            refusal = SUBCLASS if isinstance(stranger, tuple(known)) else UNKNOWN_BLOCK
        # A block that replaces another one temporarily names the remedy itself.
        reason = getattr(stranger, "why_not_convertible", None) or refusal.reason
        raise UnsupportedModelError(
            f"{name} is not supported: blocks[{index}] is {qualified_name(stranger)} "
            f"({len(strangers)} of {len(blocks)} blocks are of no supported class): {reason}. {refusal.instead}"
        )
    removed = tuple(i for i, block in enumerate(blocks) if type(block) is AttentionFreeBlock)
    scales = {blocks[i].residual_scale for i in removed}
    if len(scales) > 1:
        raise UnsupportedModelError(f"{name} mixes attention-free blocks of residual_scale {sorted(scales)}")
    norms = (getattr(model, "norm", None), getattr(model, "fc_norm", None))
    pooling = getattr(model, "global_pool", "")
    return ViTStructure(
        depth=len(blocks),
        removed=removed,
        residual_scale=scales.pop() if scales else 1.0,
        pooling=pooling if isinstance(pooling, str) else str(pooling),
        has_final_norm=any(n is not None and not isinstance(n, nn.Identity) for n in norms),
        families=tuple(dict.fromkeys(find_family(block).name for block in blocks)),
        merging=tuple(i for i, block in enumerate(blocks) if type(block) is MergingBlock),
    )


def refuse_merging(structure: ViTStructure, doing: str) -> None:
    """Refuse token merging for `doing`, an operation that runs blocks one by one and would lose the sizes of merged tokens."""
    if structure.merging:
        raise UnsupportedModelError(
            f"{doing} does not support token merging, and blocks {list(structure.merging)} merge tokens. Turn merging off "
            "with convert_vit(model, remove, tome_r=0), and on again afterwards"
        )


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    remedies = {
        "DistributedDataParallel": ("module", "convert before wrapping, or pass model.module and wrap again"),
        "FullyShardedDataParallel": ("module", "convert before wrapping"),
        "DataParallel": ("module", "convert before wrapping, or pass model.module and wrap again"),
        "OptimizedModule": ("_orig_mod", "convert before torch.compile, or pass model._orig_mod and compile again"),
        "FeatureGetterNet": ("model", _FEATURES),
        "FeatureModel": ("model", _FEATURES),
    }
    wrapper = type(model).__name__
    if wrapper in remedies:
        inner, remedy = remedies[wrapper]
        if isinstance(getattr(model, inner, None), nn.Module):
            raise UnsupportedModelError(f"{wrapper} wraps the model, and would still run the old blocks: {remedy}")
