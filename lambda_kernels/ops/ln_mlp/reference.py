"""`ln_mlp` in plain PyTorch: the oracle of the tests, and the path that runs anywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    y = scale_residual(x, residual_scale)
    pre = F.linear(normalize(y, ln_weight, ln_bias, eps), w1, b1)
    return add_branch(y, F.gelu(pre, approximate=approximate), w2, b2, layer_scale, branch_scale)


def scale_residual(x: Tensor, by: float) -> Tensor:
    """s·x; x itself where s is 1."""
    return x if by == 1.0 else by * x


def normalize(y: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float) -> Tensor:
    """LN(y) for y = s·x."""
    return F.layer_norm(y, (y.shape[-1],), ln_weight, ln_bias, eps)


def add_branch(
    y: Tensor, act: Tensor, w2: Tensor, b2: Tensor | None, layer_scale: Tensor | None, branch_scale: Tensor | None
) -> Tensor:
    """The output for y = s·x and GELU's output `act` [..., H]."""
    branch = F.linear(act, w2, b2)
    if layer_scale is not None:
        branch = branch * layer_scale
    if branch_scale is not None:
        branch = branch * branch_scale.to(branch.dtype).unsqueeze(-1)
    return y + branch
