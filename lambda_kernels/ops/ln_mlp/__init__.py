"""LayerNorm, both linears of an MLP and its GELU as one operator, forward and backward."""

from .function import APPROXIMATIONS, RECOMPUTE, compute_dtype, ln_mlp, resolve_recompute

__all__ = ["APPROXIMATIONS", "RECOMPUTE", "compute_dtype", "ln_mlp", "resolve_recompute"]
