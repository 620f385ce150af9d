"""Blocks that merge tokens between their attention and their MLP, and the sequence that runs them.

The state of merging (the sizes of tokens and where they went) belongs to one forward. The sequence creates it, passes it from
block to block as an argument and drops it at the end. No module stores it, so that copies, threads and concurrent forwards
cannot interfere.
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
    "this block merges tokens and needs their sizes, which only a call of the whole `model.blocks` passes to it; it was called "
    "alone, or with a mask. Gradient checkpointing, forward_intermediates, get_intermediate_layers and masks call blocks one "
    "by one: turn them off (recompute='all' saves memory instead; intermediate features of merged tokens are not maps), or "
    "turn merging off with convert_vit(model, …, tome_r=0)"
)


class MergeState:
    """The merged tokens of one forward."""

    def __init__(self) -> None:
        # [B, present N]: how many of the original tokens each token represents; None before the first merge.
        self.sizes: Tensor | None = None
        # [B, original N]: the present index of each original token; None before the first merge.
        self.place: Tensor | None = None

    def merge(self, x: Tensor, merge: Merge) -> Tensor:
        """Merge the tokens x [B, N, C], and record it."""
        sizes = self.sizes
        if sizes is None:
            sizes = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x, self.sizes = merge_tokens(x, sizes, merge)
        self.place = merge.place if self.place is None else compose_places(self.place, merge.place)
        return x


class MergingBlock(FusedMlp):
    """A ViT block that merges `tome_r` tokens into similar ones between its attention and its MLP.

    Its attention weights tokens by their sizes. It holds the submodules of timm's `Block` under their names, like
    `FusedMlp`; merging has no parameters. It works only inside a `MergingSequential`. At most half of the present patches are
    merged, and never the `prefix_tokens` at the front, which are not patches.
    """

    def __init__(self, *parts: nn.Module, tome_r: int, prefix_tokens: int, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.tome_r = tome_r
        self.prefix_tokens = prefix_tokens

    def forward(  # type: ignore[override]  # the arguments of timm's Block, and the state from MergingSequential
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, state: MergeState | None = None
    ) -> Tensor:
        if state is None or attn_mask is not None or is_causal:
            raise RuntimeError(_ALONE)
        r = count_mergeable(x.shape[1], self.tome_r, self.prefix_tokens)
        if r == 0 and state.sizes is None:
            return super().forward(x)
        branch, keys = self._attend(self.norm1(x), state.sizes)
        x = x + self.drop_path1(self.ls1(branch))
        if r:
            x = state.merge(x, match_tokens(keys, r, protected=self.prefix_tokens))
        return self._mlp_half(x)

    def _attend(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output of `attn` for x [B, N, C] with tokens of these sizes, and the mean [B, N, D] of its keys over heads."""
        attn = self.attn
        if is_altered(attn):
            raise RuntimeError(
                "a hook or a replaced forward on the attention of a block that merges tokens would not run: the block calls "
                "the attention's parts. Hook those, or turn merging off with convert_vit(model, …, tome_r=0)"
            )
        batch, tokens, _ = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        fused = bool(attn.fused_attn)
        dropping = (attn if fused else attn.attn_drop).training  # the module whose mode timm checks
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
    """The blocks of a model of which some merge tokens. The output has as many tokens as the input.

    After the last block, every original token receives the value of the token that it was merged into. So timm's mean over
    patches is the mean weighted by size, max pooling and attention pooling are right too, and a dense head finds each patch
    in its place, for the cost of one copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        state = MergeState()
        for block in self:
            x = block(x, state=state) if type(block) is MergingBlock else block(x)
        return x if state.place is None else unmerge_tokens(x, state.place)


# The parts of timm's Attention in the known versions; another part would do something that `_attend` omits.
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}
_OPTIONAL_PARTS = {"norm", "gate"}
_KNOWN_ARGUMENTS = {"self", "x", "attn_mask", "is_causal"}
_UNKNOWN_ARGUMENTS = sorted(set(inspect.signature(Attention.forward).parameters) - _KNOWN_ARGUMENTS)


def find_merging_obstacles(block: nn.Module) -> list[str]:
    """Why `block` cannot merge tokens; empty when it can."""
    if type(block) not in (Block, FusedMlp, MergingBlock):
        return [f"it is {qualified_name(block)}, and merging supports only timm.models.vision_transformer.Block"]
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
    """A block that merges tokens in place of timm's or ours, which does not change; `block` itself if it is that already."""
    options |= {"tome_r": tome_r, "prefix_tokens": prefix_tokens}
    return copy_with(block, **options) if type(block) is MergingBlock else MergingBlock.from_block(block, **options)


def remove_merging(block: nn.Module) -> nn.Module:
    """A block that does not merge in place of `block`: itself, or a `FusedMlp` with the submodules of a `MergingBlock`."""
    if type(block) is not MergingBlock:
        return block
    found = find_replacement_obstacles(block)
    if found:
        raise UnsupportedModelError(f"token merging cannot be turned off: {'; '.join(found)}")
    return FusedMlp.from_block(block)


def wrap_block_sequence(blocks: nn.Sequential | nn.ModuleList, merges: bool) -> nn.Sequential | nn.ModuleList:
    """The blocks in a `MergingSequential` if some merge tokens, else in a plain sequence: `blocks` itself where possible."""
    if merges == (type(blocks) is MergingSequential):
        return blocks
    new = (MergingSequential if merges else nn.Sequential)(OrderedDict(blocks.named_children()))
    new.training = blocks.training
    return new


def count_tokens(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[int, int]] | None:
    """(input tokens, merged tokens) of each block, for images of the size that the model was built for.

    None if no block merges tokens, or if the model does not know its number of patches.
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
