"""LayerNorm, both linears of an MLP and its GELU as one operator, forward and backward."""

from .function import ln_mlp

__all__ = ["ln_mlp"]
