"""Blocks that merge tokens between their attention and their MLP, and the sequence that takes tokens through them.

What a merge has to know of the ones before it (the sizes of tokens and where they went) belongs to one forward. It is made
by the sequence, handed from block to block as an argument and dropped at the end: nothing of it stays on a module, so that
copies, threads and forwards cannot meet.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..ops.token_merging import (
    Merge,
    compose_places,
    count_mergeable,
    match_tokens,
    merge_tokens,
    proportional_attention,
    unmerge_tokens,
)
from .fused_mlp import FusedMlp
from .hooks import is_altered
from .mlp_block import copy_with, find_replacement_obstacles
from .refusals import qualified_name

_ALONE = (
    "this block merges tokens and has to know their sizes, which only a whole `model.blocks` hands on; it was called alone, "
    "or with a mask. Gradient checkpointing, forward_intermediates, get_intermediate_layers and masks go block by block: "
    "turn them off (recompute='all' saves memory instead; intermediate features of merged tokens are no maps), or take "
    "merging off with convert_vit(model, …, tome_r=0)"
)


class Carried:
    """What one forward knows about its merged tokens.

    Attributes:
        sizes: [B, N now]: how many of the first tokens each one stands for; None before the first merge.
        place: [B, N at first]: where each of the first tokens is now; None before the first merge.
    """

    def __init__(self) -> None:
        self.sizes: Tensor | None = None
        self.place: Tensor | None = None

    def merge(self, x: Tensor, merge: Merge) -> Tensor:
        """Merge the tokens x [B, N, C], and remember it."""
        sizes = self.sizes
        if sizes is None:
            sizes = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x, self.sizes = merge_tokens(x, sizes, merge)
        self.place = merge.place if self.place is None else compose_places(self.place, merge.place)
        return x


class MergingBlock(FusedMlp):
    """A ViT block that merges `tome_r` tokens into similar ones between its attention and its MLP.

    Its attention counts tokens by their sizes. Holds the submodules of timm's `Block` under their names, like `FusedMlp`;
    merging has no parameters. Works inside a `MergingSequential` alone.

    Args:
        parts: As for `FusedMlp`.
        tome_r: Tokens to merge; at most half of the patches that are left are.
        prefix_tokens: Tokens at the front that are no patches: they stay by themselves.
        options: As for `FusedMlp`.
    """

    def __init__(self, *parts: nn.Module, tome_r: int, prefix_tokens: int, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.tome_r = tome_r
        self.prefix_tokens = prefix_tokens

    def forward(  # type: ignore[override]  # what timm's Block takes, and what MergingSequential hands on
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, carried: Carried | None = None
    ) -> Tensor:
        if carried is None or attn_mask is not None or is_causal:
            raise RuntimeError(_ALONE)
        r = count_mergeable(x.shape[1], self.tome_r, self.prefix_tokens)
        if r == 0 and carried.sizes is None:
            return super().forward(x)
        branch, keys = self._attend(self.norm1(x), carried.sizes)
        x = x + self.drop_path1(self.ls1(branch))
        if r:
            x = carried.merge(x, match_tokens(keys, r, protected=self.prefix_tokens))
        return self._mlp_half(x)

    def _attend(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `attn` gives for x [B, N, C] where tokens have sizes, and its keys, their mean over the heads, [B, N, D]."""
        attn = self.attn
        if is_altered(attn):
            raise RuntimeError(
                "a hook or a replaced forward on the attention of a block that merges tokens would not run: the block works "
                "with the attention's parts. Hook those, or take merging off with convert_vit(model, …, tome_r=0)"
            )
        batch, tokens, _ = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        fused = bool(attn.fused_attn)
        dropping = (attn if fused else attn.attn_drop).training  # whose mode timm asks for
        out = proportional_attention(
            q, k, v, sizes,
            dropout=attn.attn_drop.p if dropping else 0.0,
            fused=fused,
            scale=None if fused else attn.scale,
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(batch, tokens, attn.num_heads * attn.head_dim)
        if "norm" in attn._modules:
            out = attn.norm(out)
        if attn._modules.get("gate") is not None:
            out = out * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out)), k.mean(1)

    def extra_repr(self) -> str:
        return f"tome_r={self.tome_r}, prefix_tokens={self.prefix_tokens}"


class MergingSequential(nn.Sequential):
    """The blocks of a model of which some merge tokens. What comes out has as many tokens as went in.

    Behind the last block every token of the beginning gets what it was merged into. So the mean over patches that timm takes
    is the mean weighted by size, the largest value and attention pooling are right too, and a dense head finds each patch in
    its place; it costs one copy of rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        carried = Carried()
        for block in self:
            x = block(x, carried=carried) if type(block) is MergingBlock else block(x)
        return x if carried.place is None else unmerge_tokens(x, carried.place)


# What timm's Attention is made of in the versions that are known; another part would do something that is not done here.
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}
_OPTIONAL_PARTS = {"norm", "gate"}
_KNOWN_ARGUMENTS = {"self", "x", "attn_mask", "is_causal"}
_UNKNOWN_ARGUMENTS = sorted(set(inspect.signature(Attention.forward).parameters) - _KNOWN_ARGUMENTS)


def find_merging_obstacles(block: nn.Module) -> list[str]:
    """Why `block` cannot merge tokens; empty when it can."""
    if type(block) not in (Block, FusedMlp, MergingBlock):
        return [f"it is {qualified_name(block)}, and merging knows timm.models.vision_transformer.Block alone"]
    found = [] if type(block) is MergingBlock else find_replacement_obstacles(block)
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


def make_merging_block(block: nn.Module, tome_r: int, prefix_tokens: int, **options: Any) -> MergingBlock:
    """A block that merges tokens in place of `block`, which does not change; `block` itself if it is that already.

    Args:
        block: timm's, a `FusedMlp` or a `MergingBlock`.
        tome_r: As for `MergingBlock`.
        prefix_tokens: As for `MergingBlock`.
        options: `fuse`, `backend` and `recompute`, as for `FusedMlp`.
    """
    options |= {"tome_r": tome_r, "prefix_tokens": prefix_tokens}
    return copy_with(block, **options) if type(block) is MergingBlock else MergingBlock.from_block(block, **options)


def remove_merging(block: nn.Module) -> nn.Module:
    """`block` as one that does not merge: itself, or a `FusedMlp` around the submodules of a `MergingBlock`.

    Raises:
        UnsupportedModelError: It carries hooks or anything else that would be lost.
    """
    if type(block) is not MergingBlock:
        return block
    found = find_replacement_obstacles(block)
    if found:
        raise UnsupportedModelError(f"a block that merges tokens cannot be put back: {'; '.join(found)}")
    return FusedMlp.from_block(block)


def wrap_block_sequence(blocks: nn.Sequential | nn.ModuleList, merges: bool) -> nn.Sequential | nn.ModuleList:
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
        merged = count_mergeable(tokens, block.tome_r, block.prefix_tokens) if type(block) is MergingBlock else 0
        counts.append((tokens, merged))
        tokens -= merged
    return counts
