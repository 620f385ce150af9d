"""What each timm model looks like to this library: which blocks it can change, and what their parts are called.

All that blocks, surgery, paths and dilution know about a family of blocks is in its `Family`; what is refused, and why, is in
`refusals`. Blocks are compared by class identity, never by name or by attributes: several timm families share the attribute
names `norm1`, `attn`, `mlp` and mean other things by them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .refusals import NO_BLOCKS, SUBCLASS, UNKNOWN_BLOCK, qualified_name, refusal_of

_FEATURES = "convert the whole model first, then wrap it: lambda_kernels.features.feature_model(converted, out_indices)"


@dataclass(frozen=True)
class Family:
    """One kind of block: `x ← x + drop_path1(scale1(attn(norm1(x)))); x ← x + drop_path2(scale2(mlp(norm2(x))))`.

    Attributes:
        name: How blocks of this library remember which family theirs was.
        block: timm's class.
        scales: What the LayerScales of attention and MLP are called.
        bare: They are parameters of the block itself, or None where there is none; else modules, an identity for none.
        arguments: What `forward` takes beyond tokens and hands on to the attention, in timm's order, with defaults.
        attributes: Plain values that timm keeps on the block and that a replacement takes over.
        parts: The submodules and bare scales of a block, in timm's order.
        accepted: What timm's own block takes beyond tokens in the version that is installed.
    """

    name: str
    block: type[nn.Module]
    scales: tuple[str, str]
    bare: bool
    arguments: Mapping[str, object]
    attributes: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(init=False)
    accepted: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        of_attention, of_mlp = self.scales
        parts = ("norm1", "attn", of_attention, "drop_path1", "norm2", "mlp", of_mlp, "drop_path2")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "accepted", tuple(inspect.signature(self.block.forward).parameters)[2:])

    @property
    def unknown_arguments(self) -> list[str]:
        """What this version of timm may pass to its blocks and this description does not know."""
        return [name for name in self.accepted if name not in self.arguments]

    def for_attention(self, positional: tuple[object, ...], named: dict[str, Any]) -> dict[str, Any]:
        """What a block was called with beyond tokens, as keyword arguments for its attention.

        Arguments that were not given are passed with their defaults where timm's block passes them.

        Raises:
            TypeError: An argument that the family's blocks do not take, or one given twice.
        """
        if not positional and not named:
            return {name: self.arguments[name] for name in self.accepted}
        names = tuple(self.arguments)
        if len(positional) > len(names):
            raise TypeError(f"forward() takes tokens and {len(names)} more arguments; got {len(positional)} more")
        given = dict(zip(names, positional, strict=False))
        for name, value in named.items():
            if name not in names:
                raise TypeError(f"forward() got an unexpected argument {name!r}; it takes {', '.join(names)}")
            if name in given:
                raise TypeError(f"forward() got {name!r} twice")
            given[name] = value
        # An attention that does not know an argument refuses it, as it does under timm's block; a default says nothing.
        return {
            name: given.get(name, default)
            for name, default in self.arguments.items()
            if name in self.accepted or given.get(name, default) is not default
        }


_MASKS = {"attn_mask": None, "is_causal": False}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("vit", vision_transformer.Block, ("ls1", "ls2"), False, _MASKS),
        Family("eva", eva.EvaBlock, ("gamma_1", "gamma_2"), True, {"rope": None, **_MASKS}, ("init_values",)),
        Family("beit", beit.Block, ("gamma_1", "gamma_2"), True, {"shared_rel_pos_bias": None}, ("init_values",)),
    )
}


def family_of(block: nn.Module) -> Family | None:
    """The family of timm's own block, or of a block of this library that stands for one; None for all others."""
    from .blocks import MlpHalf  # which describes itself by the families here

    if isinstance(block, MlpHalf):
        return FAMILIES[block.family]
    return next((family for family in FAMILIES.values() if type(block) is family.block), None)


def layer_scale(block: nn.Module, scale: str) -> Tensor | None:
    """γ [C] of a LayerScale of a block, by its name in the block's family; None for none."""
    found = getattr(block, scale, None)
    return getattr(found, "gamma", None) if isinstance(found, nn.Module) else found


@dataclass(frozen=True)
class Front:
    """What a model does before its blocks, so that a view of it can take tokens in place of images.

    Attributes:
        identities: Submodules that then do nothing.
        absent: Attributes that are then None.
        no_tokens: Prefix tokens `[1, n, C]` of which none is then put before the others.
        pos_embed: What `_pos_embed` gives besides tokens; None where the model has no such method.
    """

    identities: tuple[str, ...]
    absent: tuple[str, ...] = ()
    no_tokens: tuple[str, ...] = ()
    pos_embed: tuple[None, ...] | None = ()


_VIT_FRONT = Front(("patch_embed", "patch_drop", "norm_pre"))
_FRONTS: dict[type[nn.Module], Front] = {
    eva.Eva: Front(("patch_embed", "norm_pre"), pos_embed=(None,)),
    beit.Beit: Front(("patch_embed",), ("pos_embed", "rel_pos_bias"), ("cls_token",), None),
}


def front_of(model: nn.Module) -> Front:
    """How to leave out what `model` does before its blocks; that of a ViT for models of unknown classes."""
    return next((_FRONTS[cls] for cls in type(model).__mro__ if cls in _FRONTS), _VIT_FRONT)


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
    families: tuple[str, ...] = field(default=("vit",))  # of the blocks, each once, in order
    merging: tuple[int, ...] = ()  # blocks that merge tokens


def inspect_model(model: nn.Module) -> Anatomy:
    """Describe `model`, or refuse it.

    Raises:
        UnsupportedModelError: The model is wrapped, has no `blocks`, or its blocks are of a class whose attention cannot
            be removed alone. Names the class, the reason and an alternative. The model is never changed.
    """
    from .blocks import AttentionFreeBlock, FusedMlp
    from .merging_block import MergingBlock

    _refuse_wrappers(model)
    blocks = getattr(model, "blocks", None)
    name = type(model).__name__
    refusal = refusal_of(model)
    if refusal is None and (not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0):
        refusal = NO_BLOCKS
    if refusal is not None:
        raise UnsupportedModelError(f"{name} is not supported: {refusal.reason}. {refusal.instead}")
    known = {family.block for family in FAMILIES.values()} | {FusedMlp, MergingBlock, AttentionFreeBlock}
    strangers = {i: block for i, block in enumerate(blocks) if type(block) not in known}
    if strangers:
        index, stranger = next(iter(strangers.items()))
        refusal = refusal_of(stranger)
        if refusal is None:
            refusal = SUBCLASS if isinstance(stranger, tuple(known)) else UNKNOWN_BLOCK
        # A block that stands in for another one for a while can say itself what has to be done first.
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
    return Anatomy(
        depth=len(blocks),
        removed=removed,
        residual_scale=scales.pop() if scales else None,
        pooling=pooling if isinstance(pooling, str) else str(pooling),
        has_final_norm=any(n is not None and not isinstance(n, nn.Identity) for n in norms),
        families=tuple(dict.fromkeys(family_of(block).name for block in blocks)),
        merging=tuple(i for i, block in enumerate(blocks) if type(block) is MergingBlock),
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
        "FeatureGetterNet": ("model", _FEATURES),
        "FeatureModel": ("model", _FEATURES),
    }
    wrapper = type(model).__name__
    if wrapper in remedies:
        inner, remedy = remedies[wrapper]
        if isinstance(getattr(model, inner, None), nn.Module):
            raise UnsupportedModelError(f"{wrapper} wraps the model, and would keep what it saw before: {remedy}")
