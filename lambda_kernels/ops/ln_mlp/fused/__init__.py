"""The fused path of `ln_mlp`: Triton kernels, their launches, and the choice among them."""
