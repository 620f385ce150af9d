"""Token merging as functions of tensors: which tokens are alike, their average, attention that knows their sizes.

Source: D. Bolya et al., Token Merging: Your ViT But Faster (arXiv 2210.09461), section 3. Written from the paper's text and
equations. Shapes depend on shapes alone, never on values, so that all of it compiles and exports as one graph, and no sum of
a forward depends on the order in which a device adds, so that it repeats.

B samples of N tokens with C channels; r tokens are merged into others; H heads of width D.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import autocast_enabled, check_same_device, check_shape, check_tensor, require_int


class Merge(NamedTuple):
    """Which tokens become one. Indices are int64; "before" counts 0…N−1, "behind" 0…N−r−1.

    Attributes:
        kept: [B, N − r]: the tokens before that are there behind, in the same order.
        source: [B, r]: the tokens before that are merged into one of those.
        into: [B, r]: where that one is behind.
        place: [B, N]: where each token before has gone.
    """

    kept: Tensor
    source: Tensor
    into: Tensor
    place: Tensor


def count_mergeable(tokens: int, r: int, protected: int = 0) -> int:
    """How many of `r` tokens can be merged in one step: at most half of those that are not protected."""
    return min(r, max(tokens - protected, 0) // 2)


def match_tokens(keys: Tensor, r: int, *, protected: int = 0) -> Merge:
    """Bipartite soft matching: the r pairs of most similar tokens between two alternating halves.

    Tokens that are not protected go in turn to a set of sources and one of targets. Each source has one edge, to the target
    whose key has the largest cosine with its own, and the r edges with the largest cosines are merged. Several sources may
    go into one target. No gradient flows through the choice.

    Args:
        keys: [B, N, D]; any floating dtype, compared in float32 or wider.
        r: Tokens to merge, at most as many as `count_mergeable` allows.
        protected: Number of tokens at the front, such as a class token, that are neither merged nor merged into.

    Raises:
        TypeError: `keys` is not a floating-point tensor, or `r` or `protected` is not an integer.
        ValueError: `keys` does not have three dimensions, or an integer is out of range.
    """
    check_tensor("keys", keys)
    if keys.dim() != 3:
        raise ValueError(f"keys must have shape [B, N, D]; got {list(keys.shape)}")
    r = require_int("r", r, 0, wrong_type=TypeError)
    protected = require_int("protected", protected, 0, wrong_type=TypeError)
    batch, tokens, _ = keys.shape
    if protected > tokens:
        raise ValueError(f"protected must be at most the {tokens} tokens there are; got {protected}")
    r = count_mergeable(tokens, r, protected)
    every = torch.arange(tokens, device=keys.device).expand(batch, tokens)
    if r == 0:
        nothing = every[:, :0]
        return Merge(every, nothing, nothing, every)
    with _full_precision(keys):
        keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
        keys = F.normalize(keys[:, protected:], dim=-1)
        likeness, target = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)
    edges = likeness.topk(r, sorted=False).indices
    source, target = protected + 2 * edges, protected + 1 + 2 * target.gather(1, edges)
    gone = torch.zeros_like(source, dtype=torch.bool)  # a tensor, since torch.jit.trace cannot scatter a Python bool
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device).scatter(1, source, gone)
    place = stays.cumsum(1) - 1
    into = place.gather(1, target)
    # Those that go are written to one more place, which is cut off: without that the number kept would depend on values.
    left = tokens - r
    kept = torch.zeros(batch, left + 1, dtype=torch.int64, device=keys.device)
    kept = kept.scatter(1, torch.where(stays, place, left), every)[:, :left]
    return Merge(kept, source, into, place.scatter(1, source, into))


def merge_tokens(x: Tensor, sizes: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """Average merged tokens, weighted by their sizes: `x' = Σ s·x / Σ s`, `s' = Σ s` over what becomes one token.

    Tokens into which nothing is merged stay bit for bit.

    Args:
        x: [B, N, C], any floating dtype; differentiable.
        sizes: [B, N]: how many tokens of the beginning each one stands for. Their dtype is that of the weights.
        merge: From `match_tokens`.

    Returns:
        [B, N − r, C] in the dtype of `x`, and [B, N − r].

    Raises:
        TypeError: `x` or `sizes` is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.
    """
    check_tensor("x", x)
    check_tensor("sizes", sizes)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, C]; got {list(x.shape)}")
    check_shape("sizes", sizes, tuple(x.shape[:2]), "[B, N]")
    check_shape("merge.place", merge.place, tuple(x.shape[:2]), "[B, N]")
    check_same_device({"x": x, "sizes": sizes, "merge": merge.place})
    kept = sizes.gather(1, merge.kept)
    behind = torch.arange(kept.shape[1], device=x.device)
    # [B, N − r, r]: the sizes of what goes into each one. A sum by index would add in an order of the device's own.
    share = torch.where(merge.into[:, None] == behind[:, None], sizes.gather(1, merge.source)[:, None], 0)
    total = kept + share.sum(-1)
    with _full_precision(x):
        own = _take(x, merge.kept) * (kept / total)[..., None].to(x.dtype)
        return torch.baddbmm(own, (share / total[..., None]).to(x.dtype), _take(x, merge.source)), total


def unmerge_tokens(x: Tensor, place: Tensor) -> Tensor:
    """Give every token of the beginning what it was merged into: a mean over the result is weighted by sizes.

    Args:
        x: [B, M, C]; differentiable.
        place: [B, N], from `Merge.place` or `compose_places`.

    Returns:
        [B, N, C].

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.
    """
    check_tensor("x", x)
    if x.dim() != 3 or place.dim() != 2 or place.shape[0] != x.shape[0]:
        raise ValueError(f"x and place must be [B, M, C] and [B, N]; got {list(x.shape)} and {list(place.shape)}")
    check_same_device({"x": x, "place": place})
    return _take(x, place)


def compose_places(first: Tensor, second: Tensor) -> Tensor:
    """Where tokens are after two merges: [B, N], out of the `place` of the first, [B, N], and of the second, [B, N − r]."""
    return second.gather(1, first)


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    *,
    dropout: float = 0.0,
    fused: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(QKᵀ/√d + log s)·V: a key of size s counts as s copies of it would.

    Args:
        q: [B, H, N, D].
        k: [B, H, N, D].
        v: [B, H, N, D].
        sizes: [B, N], positive; None: all are one.
        dropout: Of the attention weights.
        fused: One call of PyTorch's attention, or its steps one by one.
        scale: Of the products; None is 1/√D.
    """
    bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    weights = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    weights = (weights if bias is None else weights + bias).softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]]: rows of a flat view, which PyTorch copies many times faster than a gather spread over channels."""
    batch, tokens, channels = x.shape
    flat = index + torch.arange(batch, device=x.device)[:, None] * tokens
    return x.reshape(batch * tokens, channels).index_select(0, flat.reshape(-1)).reshape(*index.shape, channels)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: rounded to bfloat16, like keys would all tie, and averages be worse than the tokens they are of."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocast_enabled(kind) else contextlib.nullcontext()
