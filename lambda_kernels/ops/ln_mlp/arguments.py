"""The arguments of one call of `ln_mlp`, as records that every path shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# `save` where no gradient will be asked for; its other values are those of `recompute`.
SAVE_NOTHING = "nothing"


# What the forward saves for the backward, by `recompute`: "nothing" where no gradient is wanted.
SAVE = {SAVE_NOTHING: (), "all": ("stats",), "act": ("stats", "pre"), "none": ("stats", "pre", "act")}


@dataclass(frozen=True)
class Parameters:
    """γ [C], β [C], W1 [H, C], b1 [H], W2 [C, H], b2 [C], LayerScale [C], the branch's factor for each token, float32 [M].

    All but the matrices may be None.
    """

    gamma: Tensor | None
    beta: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    ls: Tensor | None
    keep: Tensor | None


@dataclass(frozen=True)
class Options:
    """LayerNorm's epsilon, the residual's factor s, and the form of GELU: "none" or "tanh"."""

    eps: float
    scale: float
    approximate: str


# Backward


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    x: bool
    gamma: bool
    beta: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool
    ls: bool


@dataclass(frozen=True)
class Saved:
    """What the forward kept: row statistics always, p and GELU(p) [M, H] if it was asked to."""

    mean: Tensor
    rstd: Tensor
    pre: Tensor | None
    act: Tensor | None
