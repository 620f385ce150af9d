"""`torch.ops.lambda_kernels.ln_mlp` and its backward: schemas, shapes without data, autograd, FLOP counts.

Importing this registers them and does not import triton; the kernels are imported at the first call. Inside
`torch.compile` the two operators are opaque; what is exported does without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import SAVE_NOTHING

# A fragment, since the compiled extension registers operators under the same name.
_library = torch.library.Library("lambda_kernels", "FRAGMENT")


_PARAMETERS = (
    "Tensor? ln_weight, Tensor? ln_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? layer_scale, "
    "Tensor? branch_scale, float eps, float residual_scale, str approximate"
)


# `save` says what the backward gets: nothing, or by `recompute` "all" (row statistics), "act" (and p, what GELU is applied
# to), "none" (and GELU(p)). What is not saved comes back empty.
_library.define(
    f"ln_mlp(Tensor x, {_PARAMETERS}, str save) -> (Tensor out, Tensor mean, Tensor rstd, Tensor pre, Tensor act)"
)

# Gradients of x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, empty where `needs` says so.
_library.define(
    f"ln_mlp_backward(Tensor grad, Tensor x, {_PARAMETERS}, Tensor mean, Tensor rstd, Tensor? pre, Tensor? act, "
    "bool[8] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale, eps, residual_scale, approximate, save
) -> tuple[Tensor, ...]:
    from . import arguments
    from .fused import stages

    parameters = arguments.Parameters(ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale)
    options = arguments.Options(eps, residual_scale, approximate)
    out, saved = stages.forward(x, parameters, options, save)
    return out, *(x.new_empty(0) if saved[k] is None else saved[k] for k in ("mean", "rstd", "pre", "act"))


def _backward(
    grad,
    x,
    ln_weight,
    ln_bias,
    w1,
    b1,
    w2,
    b2,
    layer_scale,
    branch_scale,
    eps,
    residual_scale,
    approximate,
    mean,
    rstd,
    pre,
    act,
    needs,
) -> tuple[Tensor, ...]:
    from . import arguments
    from .fused import stages

    gradients = stages.backward(
        grad.contiguous(),
        x,
        arguments.Parameters(ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale),
        arguments.Options(eps, residual_scale, approximate),
        arguments.Saved(mean, rstd, pre, act),
        arguments.Needs(*needs),
    )
    return tuple(grad.new_empty(0) if g is None else g for g in gradients)


# On the CPU the kernels run in Triton's interpreter; dispatch lets nothing else through.
for _device in ("CUDA", "CPU"):
    _library.impl("ln_mlp", _forward, _device)
    _library.impl("ln_mlp_backward", _backward, _device)


@torch.library.register_fake("lambda_kernels::ln_mlp", lib=_library)
def _forward_shapes(
    x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale, eps, residual_scale, approximate, save
) -> tuple[Tensor, ...]:
    tokens, hidden = x.shape[0], w1.shape[0]
    dtype = torch.promote_types(x.dtype, w1.dtype)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)

    def statistics() -> Tensor:
        return x.new_empty(tokens, dtype=torch.float32) if save != SAVE_NOTHING else x.new_empty(0)

    def hidden_tensor(kept: bool) -> Tensor:
        return w1.new_empty(tokens, hidden) if kept else x.new_empty(0)

    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        statistics(),
        statistics(),
        hidden_tensor(save in ("act", "none")),
        hidden_tensor(save == "none"),
    )


@torch.library.register_fake("lambda_kernels::ln_mlp_backward", lib=_library)
def _backward_shapes(
    grad,
    x,
    ln_weight,
    ln_bias,
    w1,
    b1,
    w2,
    b2,
    layer_scale,
    branch_scale,
    eps,
    residual_scale,
    approximate,
    mean,
    rstd,
    pre,
    act,
    needs,
) -> tuple[Tensor, ...]:
    inputs = (x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else grad.new_empty(0)
        for t, needed in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, eps, residual_scale, approximate, save = inputs
    _, mean, rstd, pre, act = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, pre, act)
    ctx.options = (eps, residual_scale, approximate)
    ctx.save = save
    ctx.save_for_backward(
        *tensors, mean, rstd, *([pre] if save in ("act", "none") else []), *([act] if save == "none" else [])
    )


def _differentiate(ctx: Any, grad: Tensor | None, *unused: None) -> tuple:
    needs = list(ctx.needs_input_grad[:8])
    if grad is None or not any(needs):
        return (None,) * 13
    if ctx.save == SAVE_NOTHING:
        raise RuntimeError("ln_mlp was called without saving anything for a backward, but a gradient is asked for")
    saved = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
    tensors, (mean, rstd, *rest) = saved[:9], saved[9:]
    pre, act = (*rest, None, None)[:2]
    gradients = torch.ops.lambda_kernels.ln_mlp_backward(grad, *tensors, *ctx.options, mean, rstd, pre, act, needs)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 5)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("the fused ln_mlp has no second derivative: use backend='torch' for that")


torch.library.register_autograd("lambda_kernels::ln_mlp", _differentiate, setup_context=_setup_context, lib=_library)

torch.library.register_autograd("lambda_kernels::ln_mlp_backward", _no_second_derivative, lib=_library)


@register_flop_formula(torch.ops.lambda_kernels.ln_mlp)
def _forward_flops(x_shape, ln_weight, ln_bias, w1_shape, *args: Any, **kwargs: Any) -> int:
    """Both products."""
    return 4 * x_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.lambda_kernels.ln_mlp_backward)
def _backward_flops(grad_shape, x_shape, ln_weight, ln_bias, w1_shape, *args: Any, **kwargs: Any) -> int:
    """The products of the gradients that are wanted, and the one that is computed again where p was not saved."""
    product = 2 * x_shape[0] * w1_shape[0] * w1_shape[1]
    *_, pre, _, needs = args
    x, gamma, beta, w1, b1, w2, _, ls = needs
    through_gelu = x or gamma or beta or w1 or b1
    through_norm = x or gamma or beta
    again = pre is None and (through_gelu or w2 or ls)
    return product * (through_gelu + through_norm + w1 + (w2 or ls) + again)
