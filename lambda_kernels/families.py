"""What each timm model looks like to this library: which blocks it can change, and why it refuses the others.

Blocks are compared by class identity, never by name or by attributes: several timm families share the attribute names
`norm1`, `attn`, `mlp` and mean other things by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .blocks import AttentionFreeBlock, FusedMlp
from .errors import UnsupportedModelError

_ADVICE = "Use a model whose blocks are timm.models.vision_transformer.Block (ViT, DeiT, DeiT-III, DINOv2, SigLIP …)"

# Qualified block or model class → why removing its attention would change more than the attention.
_REFUSED = {
    "timm.models.vision_transformer.ResPostBlock": "its norms come after the branches, so its MLP would see raw residuals",
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP share one input projection",
    "timm.models.vision_transformer.DiffParallelScalingBlock": "attention and MLP share one input projection",
    "timm.models.vision_transformer.ParallelThingsBlock": "it holds several attentions and MLPs side by side",
    "timm.models.eva.EvaBlock": "its layer scales are bare parameters and its attention takes rotary embeddings",
    "timm.models.eva.EvaBlockPostNorm": "its norms come after the branches, so its MLP would see raw residuals",
    "timm.models.beit.Block": "its layer scales are bare parameters and its attention takes relative position biases",
    "timm.models.vision_transformer_relpos.RelPosBlock": "its attention takes relative position biases",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": "its norms come after the branches",
    "timm.models.vision_transformer_sam.Block": "its attention works in windows on a 2-d token map",
    "timm.models.naflexvit.NaFlexVit": "its batches hold padding, which every statistic would have to leave out",
    "timm.models.swin_transformer.SwinTransformer": "attention in shifted windows mixes with the stages' down-sampling",
    "timm.models.swin_transformer_v2.SwinTransformerV2": "attention in shifted windows, post-norm",
    "timm.models.cait.LayerScaleBlock": "talking-heads attention, and separate class-attention blocks follow",
    "timm.models.xcit.XCABlock": "attention over channels, with a local patch interaction between it and the MLP",
    "timm.models.volo.VOLO": "outlook attention in some stages, and class-attention blocks follow",
    "timm.models.tnt.Block": "each block nests an inner transformer over pixels",
    "timm.models.convit.Block": "gated positional attention replaces the plain one in the lower blocks",
}


def qualified_name(value: object) -> str:
    """The class of `value` as module.Class."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class Anatomy:
    """What matters about a supported model before and after its attention layers are removed.

    Blocks that keep their attention count alike, whether they are timm's own or `FusedMlp`.
    """

    depth: int
    removed: tuple[int, ...]
    residual_scale: float | None  # of the removed blocks; None when none was removed
    pooling: str  # timm's global_pool: "token", "avg", "map" …
    has_final_norm: bool  # a norm between the last block and the classifier absorbs the scale of the residual
    merging: tuple[int, ...] = ()  # blocks that merge tokens


def inspect_model(model: nn.Module) -> Anatomy:
    """Describe `model`, or refuse it.

    Raises:
        UnsupportedModelError: The model is wrapped, has no `blocks`, or its blocks are of a class whose attention cannot
            be removed alone. Names the class, the reason and an alternative. The model is never changed.
    """
    from timm.models.vision_transformer import Block

    from .merging_block import MergingBlock

    _refuse_wrappers(model)
    blocks = getattr(model, "blocks", None)
    name = type(model).__name__
    reason = _REFUSED.get(qualified_name(model))
    if reason is None and (not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0):
        reason = "it has no sequence of transformer blocks named `blocks`"
    if reason is not None:
        raise UnsupportedModelError(f"{name} is not supported: {reason}. {_ADVICE}")
    known = (Block, FusedMlp, MergingBlock, AttentionFreeBlock)
    strangers = {i: blk for i, blk in enumerate(blocks) if type(blk) not in known}
    if strangers:
        index, stranger = next(iter(strangers.items()))
        # A block that stands in for another one for a while can say itself what has to be done first.
        reason = getattr(stranger, "why_not_convertible", None) or _REFUSED.get(qualified_name(stranger))
        if reason is None:
            reason = (
                "a subclass of timm's Block may compute something else"
                if isinstance(stranger, Block)
                else "this library does not know its forward"
            )
        raise UnsupportedModelError(
            f"{name} is not supported: blocks[{index}] is {qualified_name(stranger)} "
            f"({len(strangers)} of {len(blocks)} blocks are no plain ViT blocks): {reason}. {_ADVICE}"
        )
    removed = tuple(i for i, blk in enumerate(blocks) if type(blk) is AttentionFreeBlock)
    scales = {blocks[i].residual_scale for i in removed}
    if len(scales) > 1:
        raise UnsupportedModelError(f"{name} mixes attention-free blocks of residual_scale {sorted(scales)}")
    norms = (getattr(model, "norm", None), getattr(model, "fc_norm", None))
    pooling = getattr(model, "global_pool", "")
    return Anatomy(
        depth=len(blocks),
        removed=removed,
        residual_scale=scales.pop() if scales else None,
        pooling=pooling if isinstance(pooling, str) else str(pooling),
        has_final_norm=any(n is not None and not isinstance(n, nn.Identity) for n in norms),
        merging=tuple(i for i, blk in enumerate(blocks) if type(blk) is MergingBlock),
    )


def refuse_merging(anatomy: Anatomy, doing: str) -> None:
    """Refuse what works on a network block by block, where nothing hands on the sizes of merged tokens.

    Args:
        anatomy: From `inspect_model`.
        doing: What is refused, for the message.

    Raises:
        UnsupportedModelError: Some block merges tokens.
    """
    if anatomy.merging:
        raise UnsupportedModelError(
            f"{doing} works on blocks that keep their tokens, and blocks {list(anatomy.merging)} merge some. Merging comes "
            "last: take it off with convert_vit(model, remove, tome_r=0), and put it on again afterwards"
        )


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    remedies = {
        "DistributedDataParallel": ("module", "convert before wrapping, or pass model.module and wrap again"),
        "FullyShardedDataParallel": ("module", "convert before wrapping"),
        "DataParallel": ("module", "convert before wrapping, or pass model.module and wrap again"),
        "OptimizedModule": ("_orig_mod", "convert before torch.compile, or pass model._orig_mod and compile again"),
        "FeatureGetterNet": ("model", "convert before features_only wrapping, or pass model.model"),
    }
    wrapper = type(model).__name__
    if wrapper in remedies:
        inner, remedy = remedies[wrapper]
        if isinstance(getattr(model, inner, None), nn.Module):
            raise UnsupportedModelError(f"{wrapper} wraps the model, and would keep what it saw before: {remedy}")
