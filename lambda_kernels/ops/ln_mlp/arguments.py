"""The arguments of one call of `ln_mlp`, as records that every path shares. x [M, C] are tokens, H is the hidden width."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# `save` where no gradient will be requested; its other values are those of `recompute`.
SAVE_NOTHING = "nothing"

# What the forward saves for the backward: row statistics; pre, which GELU is applied to; act, its result.
SAVE = {SAVE_NOTHING: (), "all": ("stats",), "act": ("stats", "pre"), "none": ("stats", "pre", "act")}


class Parameters(NamedTuple):
    """The tensors of a call besides x, in the order of the operator's schema. All but the matrices may be None."""

    ln_weight: Tensor | None  # [C]
    ln_bias: Tensor | None  # [C]
    w1: Tensor  # [H, C]
    b1: Tensor | None  # [H]
    w2: Tensor  # [C, H]
    b2: Tensor | None  # [C]
    layer_scale: Tensor | None  # [C]
    branch_scale: Tensor | None  # a factor of each token's branch; float32 [M] in the kernels


def flatten_tokens(x: Tensor) -> Tensor:
    """x [..., C] as the kernels read it: [M, C] with unit inner stride, a view of x where that is possible."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if tokens.stride(1) != 1 or tokens.stride(0) < tokens.shape[1]:  # a transposed or expanded view
        return tokens.contiguous()
    return tokens


def make_contiguous(p: Parameters) -> Parameters:
    """The parameters as the kernels read them, each as it is where that is possible."""
    return Parameters(*(t if t is None or t.is_contiguous() else t.contiguous() for t in p))


class Options(NamedTuple):
    """The numbers of a call and the form of its GELU, in the order of the operator's schema."""

    eps: float  # LayerNorm's
    residual_scale: float  # s
    approximate: str  # "none" or "tanh"


class Needs(NamedTuple):
    """Which gradients are wanted, in the order in which the backward returns them."""

    x: bool
    ln_weight: bool
    ln_bias: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool
    layer_scale: bool

    @property
    def through_norm(self) -> bool:
        """Whether the gradient of LayerNorm's output is needed."""
        return self.x or self.ln_weight or self.ln_bias

    @property
    def through_gelu(self) -> bool:
        """Whether the gradient of GELU's input is needed."""
        return self.through_norm or self.w1 or self.b1

    @property
    def act(self) -> bool:
        """Whether GELU's output is needed."""
        return self.w2 or self.layer_scale


class Saved(NamedTuple):
    """What the forward saved: row statistics float32 [M], GELU's input and output [M, H]; None for what was not saved."""

    mean: Tensor | None = None
    rstd: Tensor | None = None
    pre: Tensor | None = None
    act: Tensor | None = None
