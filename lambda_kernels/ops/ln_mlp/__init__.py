"""LayerNorm, both linears of an MLP and its GELU as one operator, forward and backward."""
