"""A plain-PyTorch twin of every operator: the test oracle in float64, the CPU path, the baseline of the benchmarks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a histogram's input that are turned into float64 at a time: bounds the memory to some megabytes.
_CHUNK_ELEMENTS = 1 << 18


def histogram(x: Tensor, packed_grid: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """One histogram per channel, by the bin rule of `lambda_kernels.ops.histogram` in the same float64 operations.

    Args:
        x: [N, C], any floating-point dtype, strides and device.
        packed_grid: float64 [C, 4] = (anchor, inv_width, first, closed_hi); the arithmetic runs on its device.
        bins: Bins per channel.

    Returns:
        counts, int64 [C, bins], and outside, int64 [C, 5]: underflow, overflow, NaN, +Inf, −Inf.
    """
    channels, counters = x.shape[1], bins + 5
    anchor, inv_width, first, closed_hi = packed_grid.unbind(1)
    offset = counters * torch.arange(channels, device=packed_grid.device)
    table = offset.new_zeros(channels * counters)
    for chunk in x.split(max(1, _CHUNK_ELEMENTS // max(1, channels))):
        value = chunk.to(packed_grid.device)
        counter = (value.double() - anchor).mul_(inv_width).floor_().sub_(first)
        underflow = ~(counter >= 0)
        overflow = (counter >= bins) & ~(value <= closed_hi)
        counter.clamp_(max=bins - 1)  # a value on the closed upper edge
        for kind, mask in enumerate((underflow, overflow, value.isnan(), value == math.inf, value == -math.inf)):
            counter.masked_fill_(mask, bins + kind)
        position = (counter.long() + offset).reshape(-1)
        table.scatter_add_(0, position, torch.ones_like(position))
    table = table.view(channels, counters)
    return table[:, :bins].contiguous(), table[:, bins:].contiguous()


def ln_mlp(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float,
    residual_scale: float = 1.0,
    layer_scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    """`s·x + k·ls·(GELU(LN(s·x) @ w1.T + b1) @ w2.T + b2)`; arguments as for `lambda_kernels.ln_mlp`.

    The same calls in the same order as timm's `Block`, so that it rounds as timm does.
    """
    if residual_scale != 1.0:
        x = residual_scale * x
    branch = F.layer_norm(x, (x.shape[-1],), ln_weight, ln_bias, eps)
    branch = F.linear(F.gelu(F.linear(branch, w1, b1), approximate=approximate), w2, b2)
    if layer_scale is not None:
        branch = branch * layer_scale
    if branch_scale is not None:
        branch = branch * branch_scale.to(branch.dtype).unsqueeze(-1)
    return x + branch
